"""Packing of several samples into one row, and unpacking."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.minicpmv.packed import packed_samples, packing_arguments


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3))
def test_packing_reverses_unpacking(lengths: list[int], width: int) -> None:
    arguments = packing_arguments(lengths)
    samples = packed_samples(arguments)
    assert samples is not None
    packed = torch.randn(1, sum(lengths), width)
    rows = samples.unpack(packed)
    assert rows.shape == (len(lengths), max(lengths), width)
    for row, sample in zip(rows, packed[0].split(lengths), strict=True):
        assert torch.equal(row[: len(sample)], sample)
        assert not row[len(sample) :].any()
    assert torch.equal(samples.pack(rows), packed)
    assert samples.attention_mask.sum(dim=1).tolist() == lengths
    # The positions begin at 0 in each sample.
    assert arguments["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]


def test_rows_without_packing_arguments_are_not_packed() -> None:
    assert packed_samples({}) is None
