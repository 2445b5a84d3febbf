"""A tiny random MiniCPM-V 4.6 checkpoint, for the demonstration, tests and benchmarks.

The checkpoint has about a million parameters in the exact architecture, tokenizer layout and processor of the published
model, so every step reads it as it reads a published one, and nothing has to be downloaded. Its answers are
meaningless until it is trained.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.minicpmv4_6 import MiniCPMV4_6Config

IMAGE_SIDE = 112
"""Working resolution in pixels (`scale_resolution`): 8 patches of 14 pixels on each side."""

_SPECIAL_TOKENS = [
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"),
    *("<|image_pad|>", "<|video_pad|>"),
]

_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'image' %}
                {{- '<|image_pad|>\\n' }}
            {%- elif item.type == 'text' %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_tiny_checkpoint(folder: Path, seed: int = 0, corpus: tuple[str, ...] = ()) -> Path:
    """Write a MiniCPM-V 4.6 checkpoint of about a million random parameters.

    Args:
        folder: Folder that receives config, safetensors, tokenizer and processor, in the layout of the published model.
        seed: Random seed of the weights.
        corpus: Texts that the tokenizer is trained on, besides the names of the roles. Any other text is tokenized byte
            by byte.

    Returns:
        The folder.
    """
    import torch
    from transformers.models.minicpmv4_6 import (
        MiniCPMV4_6ForConditionalGeneration,
        MiniCPMV4_6ImageProcessor,
        MiniCPMV4_6Processor,
    )
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

    tokenizer = _train_tokenizer(corpus)
    torch.manual_seed(seed)
    model = MiniCPMV4_6ForConditionalGeneration(_tiny_config(tokenizer))
    # LoRA does not train the head, and with the usual standard deviation of 0.02 its logits could not exceed about 2.5:
    # the probability of any answer would stay low.
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessor(scale_resolution=IMAGE_SIDE),
        video_processor=MiniCPMV4_6VideoProcessor(scale_resolution=IMAGE_SIDE),
        tokenizer=tokenizer,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _train_tokenizer(corpus: tuple[str, ...]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*corpus, "system user assistant"],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=_SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
    )


def _tiny_config(tokenizer: "PreTrainedTokenizerFast") -> "MiniCPMV4_6Config":
    from transformers.models.minicpmv4_6 import MiniCPMV4_6Config

    return MiniCPMV4_6Config(
        image_size=IMAGE_SIDE,
        insert_layer_id=1,
        tie_word_embeddings=False,
        image_token_id=tokenizer.get_vocab()["<|image_pad|>"],
        video_token_id=tokenizer.get_vocab()["<|video_pad|>"],
        text_config={
            "model_type": "qwen3_5_text",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "max_position_embeddings": 8192,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 14,
            "image_size": IMAGE_SIDE,
            "insert_layer_id": 1,
        },
    )
