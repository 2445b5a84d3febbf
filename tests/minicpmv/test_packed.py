"""Packing and taking apart again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.minicpmv.packed import packed_samples, packing_arguments


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3))
def test_apart_and_together_again_is_the_identity(lengths: list[int], width: int) -> None:
    told = packing_arguments(lengths)
    samples = packed_samples(told)
    assert samples is not None
    packed = torch.randn(1, sum(lengths), width)
    rows = samples.unpack(packed)
    assert rows.shape == (len(lengths), max(lengths), width)
    for row, sample in zip(rows, packed[0].split(lengths), strict=True):
        assert torch.equal(row[: len(sample)], sample)
        assert not row[len(sample) :].any()
    assert torch.equal(samples.pack(rows), packed)
    assert samples.attention_mask.sum(dim=1).tolist() == lengths
    # Each sample's positions begin anew.
    assert told["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]


def test_a_row_of_one_sample_is_not_packed() -> None:
    assert packed_samples({}) is None
