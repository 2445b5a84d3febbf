"""Tiny random checkpoints of every generation in the published layout: config, weights, tokenizer, processor.

Their answers are meaningless, but they contain everything that a step reads from a checkpoint, under published names.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.minicpmv4_7 import (
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
)

from minicpmv_finetune.minicpmv.configuration import MiniCPMVConfig
from minicpmv_finetune.minicpmv.modeling import MiniCPMVForConditionalGeneration
from minicpmv_finetune.minicpmv.tiny_checkpoint import IMAGE_SIDE, write_tiny_checkpoint
from minicpmv_finetune.pipelines.demo import DEMO_CORPUS

VERSIONS = ("2.6", "4.0", "4.5", "4.6", "4.7")
_IMAGE_TOKENS = ["<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"]
_CORPUS = [*DEMO_CORPUS, "system user assistant\n\n\n<think>"]

# The pattern by which Qwen2's tokenizer splits text; two line breaks are one word, regardless of the text after them.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + _CHATML
)
# The part of Qwen3's template that matters here: think blocks are removed except from the last answer.
_THINKING = (
    "{% for message in messages %}"
    "{% set words = message['content'] %}{% set thoughts = '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in words %}"
    "{% set thoughts = words.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + words.lstrip('\n') }}"
    "{% else %}{{ words }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is true %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def write_tiny(folder: Path, version: str, seed: int = 0) -> Path:
    """Write a checkpoint of about a million random parameters.

    Args:
        folder: Folder that receives the checkpoint.
        version: One of `VERSIONS`.
        seed: Random seed of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if version in {"4.6", "4.7"}:
        write_tiny_checkpoint(folder, seed, DEMO_CORPUS)
        return _convert_to_4_7(folder, seed) if version == "4.7" else folder
    return _write_2_6_to_4_5(folder, version, seed)


def _write_2_6_to_4_5(folder: Path, version: str, seed: int) -> Path:
    bpe = _llama_tokenizer() if version == "4.0" else _qwen_tokenizer()
    names = {
        token: bpe.token_to_id(token)
        for token in ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    }
    template = {"2.6": _CHATML_WITH_SYSTEM, "4.0": _CHATML, "4.5": _THINKING}[version]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<s>" if version == "4.0" else "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            **({"add_bos_token": True} if version == "4.0" else {"pad_token": "<|endoftext|>"}),
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "MiniCPMVTokenizerFast",
            "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        },
    )
    bpe.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "MiniCPMVImageProcessor",
            "max_slice_nums": 9,
            "scale_resolution": IMAGE_SIDE,
            "patch_size": 14,
            "use_image_id": True,
            "image_feature_size": 16,
            "slice_mode": True,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
            "version": 2.6,
        },
    )
    config: dict[str, Any] = {
        "version": float(version),
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"},
        "bos_token_id": names["<s>"] if version == "4.0" else names["<|im_start|>"],
        "eos_token_id": [names["</s>"], names["<|im_end|>"]] if version == "4.0" else names["<|im_end|>"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": -(-bpe.get_vocab_size() // 64) * 64,
        "tie_word_embeddings": False,
        "patch_size": 14,
        "query_num": 16,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 64,
            "image_size": 980,
            "intermediate_size": 128,
            "model_type": "siglip",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
        **({} if version == "2.6" else {"head_dim": 32}),
    }
    if version == "4.0":
        factors = [1.0 + step / 4 for step in range(16)]
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "factor": 1.0,
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": 8192,
        }
    torch.manual_seed(seed)
    model = MiniCPMVForConditionalGeneration(MiniCPMVConfig(**config))
    # As in `write_tiny_checkpoint`: LoRA does not train the head, so its weights must be large from the start.
    torch.nn.init.normal_(model.llm.lm_head.weight, std=0.2)
    model.save_pretrained(folder)
    _write_json(folder / "config.json", {"model_type": "minicpmv", **config})
    return folder


def _convert_to_4_7(folder: Path, seed: int) -> Path:
    from transformers import AutoImageProcessor, AutoTokenizer, AutoVideoProcessor

    fields = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ["image_start", "image_end", "slice_start", "slice_end"]
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token")) for name in names}
    fields |= {"model_type": "minicpmv4_7", "newline_id": tokenizer("\n")["input_ids"][0], **ids}
    fields["vision_config"]["model_type"] = "minicpmv4_7_vision"
    # The canvas positions have three channels; each rotates its section of a head's frequencies.
    fields["text_config"]["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    torch.manual_seed(seed)
    model = MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**fields))
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    MiniCPMV4_7Processor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        video_processor=AutoVideoProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        chat_template=(folder / "chat_template.jinja").read_text(),
    ).save_pretrained(folder)
    return folder


def _qwen_tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *_IMAGE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    bpe.add_tokens(["<think>", "</think>"])
    return bpe


def _llama_tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *_IMAGE_TOKENS, "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        show_progress=False,
        max_token_length=8,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    document = json.loads(bpe.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(document))
    begin = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return bpe


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
