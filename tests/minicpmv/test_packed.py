"""Packing of several samples into one row, and unpacking."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.minicpmv import packed
from minicpmv_finetune.minicpmv.packed import packed_samples, packing_arguments


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3))
def test_packing_reverses_unpacking(lengths: list[int], width: int) -> None:
    arguments = packing_arguments(lengths)
    samples = packed_samples(arguments)
    assert samples is not None
    row_of_all = torch.randn(1, sum(lengths), width)
    rows = samples.unpack(row_of_all)
    assert rows.shape == (len(lengths), max(lengths), width)
    for row, sample in zip(rows, row_of_all[0].split(lengths), strict=True):
        assert torch.equal(row[: len(sample)], sample)
        assert not row[len(sample) :].any()
    assert torch.equal(samples.pack(rows), row_of_all)
    assert samples.attention_mask.sum(dim=1).tolist() == lengths
    # The positions begin at 0 in each sample.
    assert arguments["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]


def test_rows_without_packing_arguments_are_not_packed() -> None:
    assert packed_samples({}) is None


def test_where_a_token_is_is_computed_once_for_a_batch() -> None:
    arguments = packing_arguments([3, 1])
    samples = packed_samples(arguments)
    assert samples is not None
    assert samples.sample_ids is arguments["packed_sample_ids"]
    assert samples.offsets is arguments["packed_offsets"]
    # Transformers' own arguments are enough.
    others = packed_samples({name: arguments[name] for name in ("cu_seq_lens_q", "max_length_q")})
    assert others is not None
    assert (others.sample_ids.tolist(), others.offsets.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 0])


_GpuTensor: Any = type("_GpuTensor", (torch.Tensor,), {"is_cuda": True})
"""A tensor of the CPU that says it is on a GPU."""


def test_torchs_kernel_for_samples_of_various_lengths_has_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: torch.Tensor,
        other_borders: torch.Tensor,
        longest: int,
        other_longest: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert borders is other_borders
        assert longest == other_longest == 5
        assert window_size == (-1, 0)
        parts = [part.split(borders.diff().tolist()) for part in (query, key, value)]
        outputs = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1),
                k.transpose(0, 1),
                v.transpose(0, 1),
                is_causal=True,
                scale=scale,
                enable_gqa=enable_gqa,
            ).transpose(0, 1)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(outputs)

    monkeypatch.setattr(packed, "_varlen_attention", lambda: kernel)
    arguments: dict[str, Any] = {**packing_arguments([2, 5, 1]), "scaling": 0.3, "dropout": 0.0}
    query, key, value = (torch.randn(1, heads, 8, 16) for heads in (4, 2, 2))
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    expected, _ = packed._packed_sdpa_forward(module, query, key, value, None, **arguments)
    monkeypatch.setattr(packed, "_has_kernel", lambda device, dtype, width: True)
    query, key, value = (part.as_subclass(_GpuTensor) for part in (query, key, value))
    found, _ = packed._packed_sdpa_forward(module, query, key, value, None, **arguments)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
