"""Tokenizers and chat templates of tiny checkpoints, one for each published layout.

They have the special tokens, the way to split text and the templates of the published ones, but a small vocabulary,
which is learned from the texts that the checkpoint shall know. Any other text becomes one token per byte.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_LARGEST_VOCABULARY = 2000  # tokens, with those for bytes; a few texts fill much less
_IMAGE_TOKENS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
_NAMED_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
_ROLES = "system user assistant"
_ROLES_AND_THINKING = f"{_ROLES}\n\n\n<think>"

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
_IMAGES_AS_ITEMS = """\
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
CHAT_TEMPLATES = {
    "2.6": _CHATML_WITH_SYSTEM,
    "4.0": _CHATML,
    "4.5": _THINKING,
    "4.6": _IMAGES_AS_ITEMS,
    "4.7": _IMAGES_AS_ITEMS,
}


def tokenizer_of_4_6(corpus: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer of 4.6 and 4.7, whose special tokens have names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *_IMAGE_TOKENS, "<|image_pad|>", "<|video_pad|>"]
    _train(bpe, special, [*corpus, _ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=dict(_NAMED_TOKENS),
    )


def qwen_tokenizer(corpus: Iterable[str]) -> "Tokenizer":
    """The tokenizer of 2.6 and 4.5."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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
    _train(bpe, special, [*corpus, _ROLES_AND_THINKING])
    bpe.add_tokens(["<think>", "</think>"])
    return bpe


def llama_tokenizer(corpus: Iterable[str]) -> "Tokenizer":
    """The tokenizer of 4.0, which spells characters that it does not know in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", *_IMAGE_TOKENS, "<|im_end|>", "<|im_start|>"],
        show_progress=False,
        max_token_length=8,
    )
    bpe.train_from_iterator([*corpus, _ROLES_AND_THINKING], trainer)
    document = json.loads(bpe.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    bpe = Tokenizer.from_str(json.dumps(document))
    begin = bpe.token_to_id("<s>")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return bpe


def _train(bpe: "Tokenizer", special_tokens: list[str], texts: list[str]) -> None:
    """Learn a vocabulary whose smallest units are the 256 bytes."""
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
