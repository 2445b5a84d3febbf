"""A tiny random checkpoint of any generation, to try everything with and without a download.

The checkpoint has about a million parameters in the architecture, tokenizer layout and files of the published model, so
every step reads it as it reads a published one. Its answers are meaningless until it is trained.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import tiny_tokenizers

if TYPE_CHECKING:
    from torch import nn

IMAGE_SIDE = 112
"""Working resolution in pixels (`scale_resolution`): 8 patches of 14 pixels on each side."""
Version = Literal["2.6", "4.0", "4.5", "4.6", "4.7"]
VERSIONS: tuple[str, ...] = get_args(Version)

_LANGUAGE_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
_VISION_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}


def write_tiny_checkpoint(folder: Path, version: str = "4.6", seed: int = 0, corpus: Iterable[str] = ()) -> Path:
    """Write a checkpoint of about a million random parameters.

    Args:
        folder: Folder that receives config, safetensors, tokenizer and processor, in the layout of the published model.
        version: Generation of the model, one of `VERSIONS`.
        seed: Random seed of the weights.
        corpus: Texts that the tokenizer is trained on, besides what chat templates write. Any other text is tokenized
            byte by byte.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if version in ("4.6", "4.7"):
        _write_transformers_model(folder, version, seed, corpus)
    else:
        _write_native_model(folder, version, seed, corpus)
    return folder


def _write_transformers_model(folder: Path, version: str, seed: int, corpus: Iterable[str]) -> None:
    """Write 4.6 or 4.7, whose classes are part of transformers."""
    import torch
    from transformers.models.minicpmv4_6 import (
        MiniCPMV4_6Config,
        MiniCPMV4_6ForConditionalGeneration,
        MiniCPMV4_6ImageProcessor,
        MiniCPMV4_6Processor,
    )
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
    from transformers.models.minicpmv4_7 import (
        MiniCPMV4_7Config,
        MiniCPMV4_7ForConditionalGeneration,
        MiniCPMV4_7Processor,
    )

    tokenizer = tiny_tokenizers.tokenizer_of_4_6(corpus)
    ids = tokenizer.get_vocab()
    text_config: dict[str, Any] = {
        **_LANGUAGE_MODEL,
        "model_type": "qwen3_5_text",
        "vocab_size": max(512, _rounded_up(len(tokenizer))),
        "num_hidden_layers": 4,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings: dict[str, Any] = {
        "image_size": IMAGE_SIDE,
        "insert_layer_id": 1,
        "tie_word_embeddings": False,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "text_config": text_config,
        "vision_config": {**_VISION_TOWER, "image_size": IMAGE_SIDE, "insert_layer_id": 1},
    }
    if version == "4.7":
        settings |= {f"{name}_start_id": ids[f"<{name}>"] for name in ("image", "slice")}
        settings |= {f"{name}_end_id": ids[f"</{name}>"] for name in ("image", "slice")}
        settings["newline_id"] = tokenizer("\n")["input_ids"][0]
        # The canvas positions have three channels; each rotates its section of a head's frequencies.
        text_config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        }
    model: Any
    processor: Any
    torch.manual_seed(seed)
    if version == "4.6":
        model, processor = MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**settings)), MiniCPMV4_6Processor
    else:
        model, processor = MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**settings)), MiniCPMV4_7Processor
    _spread_logits(model.lm_head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor(
        image_processor=MiniCPMV4_6ImageProcessor(scale_resolution=IMAGE_SIDE),
        video_processor=MiniCPMV4_6VideoProcessor(scale_resolution=IMAGE_SIDE),
        tokenizer=tokenizer,
        chat_template=tiny_tokenizers.CHAT_TEMPLATES[version],
    ).save_pretrained(folder)


def _write_native_model(folder: Path, version: str, seed: int, corpus: Iterable[str]) -> None:
    """Write 2.6, 4.0 or 4.5, whose published files name classes of their own code."""
    import torch

    from .configuration import MiniCPMVConfig
    from .modeling import MiniCPMVForConditionalGeneration

    is_llama = version == "4.0"
    bpe = tiny_tokenizers.llama_tokenizer(corpus) if is_llama else tiny_tokenizers.qwen_tokenizer(corpus)
    begin, end = bpe.token_to_id("<s>" if is_llama else "<|im_start|>"), bpe.token_to_id("<|im_end|>")
    bpe.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<s>" if is_llama else "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            **({"add_bos_token": True} if is_llama else {"pad_token": "<|endoftext|>"}),
            "chat_template": tiny_tokenizers.CHAT_TEMPLATES[version],
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "MiniCPMVTokenizerFast",
            "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        },
    )
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
        **_LANGUAGE_MODEL,
        "version": float(version),
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"},
        "bos_token_id": begin,
        "eos_token_id": [bpe.token_to_id("</s>"), end] if is_llama else end,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": _rounded_up(bpe.get_vocab_size()),
        "patch_size": 14,
        "query_num": 16,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "torch_dtype": "float32",
        "vision_config": {**_VISION_TOWER, "image_size": 980, "model_type": "siglip"},
        **({} if version == "2.6" else {"head_dim": 32}),
    }
    if is_llama:
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
    _spread_logits(model.llm.lm_head)
    model.save_pretrained(folder)
    _write_json(folder / "config.json", {"model_type": "minicpmv", **config})


def _spread_logits(head: "nn.Linear") -> None:
    """Give the head larger random weights.

    LoRA does not train the head, and with the usual standard deviation of 0.02 its logits could not exceed about 2.5:
    the probability of any answer would stay low.
    """
    from torch import nn

    nn.init.normal_(head.weight, std=0.2)


def _rounded_up(tokens: int) -> int:
    return -(-tokens // 64) * 64


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
