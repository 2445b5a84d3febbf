"""Tiny checkpoints of every generation: what the writer promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpmv_finetune.data.samples import ImageRef, Sample, Turn
from minicpmv_finetune.minicpmv import tiny_tokenizers
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.tiny_checkpoint import VERSIONS, write_tiny_checkpoint
from minicpmv_finetune.pipelines.demo import QUESTION

WIDE = ImageRef(uri="wide.png", sha256="", width=300, height=200)
TEXTS = ("Which color?", "The color is turquoise.", "Qual è il colore?", "颜色是绿松石色。")


def test_there_is_one_for_every_generation() -> None:
    assert [generation.version for generation in GENERATIONS] == list(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_loads_as_its_generation_and_encodes_what_it_knows_in_few_tokens(
    version: str, tiny: Callable[[str], Path]
) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    assert generation.version == version
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    encoder = Encoder.from_checkpoint(tiny(version))
    turns = (Turn(role="user", parts=(0, QUESTION)), Turn(role="assistant", parts=("The digit is 7.",)))
    encoded = encoder.encode(Sample(id="s", images=(WIDE,), turns=turns, source="data.json"))
    supervised = [label for label in encoded.labels if label != -100]
    assert encoder.tokenizer.decode(supervised) == "The digit is 7.<|im_end|>"
    assert len(supervised) <= 7


@pytest.mark.parametrize(
    "train", [tiny_tokenizers.tokenizer_of_4_6, tiny_tokenizers.qwen_tokenizer, tiny_tokenizers.llama_tokenizer]
)
def test_a_tokenizer_knows_its_texts_and_spells_all_others(train: Callable[[tuple[str, ...]], Any]) -> None:
    def ids(tokenizer: Any, text: str) -> list[int]:
        bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
        found: list[int] = bare.encode(text, add_special_tokens=False).ids
        assert bare.decode(found) == text
        return found

    without, knowing = train(()), train(TEXTS)
    for text in TEXTS:
        assert len(ids(knowing, text)) <= len(ids(without, text)) / 2
    assert ids(knowing, "Ünknown 数字 🦜")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    once, again, other = (
        write_tiny_checkpoint(tmp_path / name, "2.6", seed, TEXTS) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    names = sorted(path.name for path in once.iterdir())
    assert [(again / name).read_bytes() for name in names] == [(once / name).read_bytes() for name in names]
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (once / weights).read_bytes()
