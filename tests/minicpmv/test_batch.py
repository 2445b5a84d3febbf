"""Pixels of a batch as uint8, which the model normalizes to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicpmv_finetune.minicpmv import batch
from minicpmv_finetune.minicpmv.batch import collate, normalize_pixels
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import ResizingLibrary


def _batches(resampler: ResizingLibrary) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = np.random.default_rng(0)
    slices = [
        random.integers(0, 256, (rows * 14, columns * 14, 3), dtype=np.uint8) for rows, columns in ((8, 8), (4, 6))
    ]
    inputs = [ModelInput("", [1, 2, 3], [], slices)]
    floats, integers = (collate(inputs, 0, 14, "right", resampler, normalized) for normalized in (True, False))
    return floats, integers


@pytest.mark.parametrize("resampler", ["pillow", "torchvision"])
def test_the_table_and_the_arithmetic_give_the_same_bits(resampler: ResizingLibrary) -> None:
    floats, integers = _batches(resampler)
    assert integers["pixel_values"].dtype == torch.uint8
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(
            normalize_pixels(integers["pixel_values"], resampler, dtype), floats["pixel_values"].to(dtype)
        )
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert len(normalize_pixels(every_value, resampler, torch.float32).unique()) == 256


@pytest.mark.parametrize("resampler", ["pillow", "torchvision"])
def test_without_a_compiler_torch_places_the_same_patches(
    resampler: ResizingLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _batches(resampler)
    monkeypatch.setattr(batch, "compile_loop", lambda function, signatures: None)
    for one, other in zip(compiled, _batches(resampler), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize("version", ["2.6", "4.0", "4.5", "4.6", "4.7"])
def test_every_tower_takes_both(version: str, tiny: Callable[[str], Path]) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    floats, integers = _batches(generation.resampler)
    encode: Any = model.encode_patches
    with torch.no_grad():
        expected = encode(floats["pixel_values"], floats["target_sizes"])
        assert torch.equal(encode(integers["pixel_values"], integers["target_sizes"]), expected)
