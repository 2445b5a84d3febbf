"""No sample is lost, and no row holds more than its capacity: packs by first-fit decreasing, and batches by tokens."""

import random

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.shards.packing import group_by_tokens, pack_samples


def _lengths(count: int, longest: int = 100) -> list[int]:
    random.seed(0)
    return [random.randint(1, longest) for _ in range(count)]


def _first_fit(order: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for number in order:
        fits = (pack for pack in packs if sum(lengths[n] for n in pack) + lengths[number] <= capacity)
        pack = next(fits, None)
        if pack is None:
            packs.append([number])
        else:
            pack.append(number)
    return packs


def test_every_sample_is_in_one_pack_that_has_room_for_it() -> None:
    lengths = _lengths(500)
    packs = pack_samples(lengths, 128, seed=1)
    assert sorted(number for pack in packs for number in pack) == list(range(500))
    assert max(sum(lengths[number] for number in pack) for pack in packs) <= 128
    # The bound is 11/9 of the smallest possible number; for real lengths the number is much smaller.
    assert len(packs) <= 1.05 * sum(lengths) / 128


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 200), st.integers(0, 9))
def test_no_sample_is_lost_and_no_pack_is_overfull(lengths: list[int], capacity: int, seed: int) -> None:
    packs = pack_samples(lengths, capacity, seed)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[number] for number in pack) <= capacity for pack in packs)


@pytest.mark.parametrize("count", [1, 2, 5, 60, 333])
def test_packs_are_those_of_first_fit_decreasing(count: int) -> None:
    lengths = _lengths(count, longest=40)
    packs = pack_samples(lengths, 64, seed=3)
    order = [number for pack in packs for number in pack]
    longest_first = sorted(order, key=lambda number: -lengths[number])
    assert sorted(sorted(lengths[n] for n in pack) for pack in packs) == sorted(
        sorted(lengths[n] for n in pack) for pack in _first_fit(longest_first, lengths, 64)
    )


def test_only_the_seed_decides_which_equally_long_samples_come_together() -> None:
    lengths = [7] * 40
    packs = list(pack_samples(lengths, 21, seed=5))
    assert packs == list(pack_samples(lengths, 21, seed=5))
    assert packs != list(pack_samples(lengths, 21, seed=6))


@pytest.mark.parametrize(("lengths", "packs"), [([], []), ([500], [[0]]), ([500, 3], [[0], [1]])])
def test_no_samples_and_samples_that_are_too_long(lengths: list[int], packs: list[list[int]]) -> None:
    assert list(pack_samples(lengths, 100, seed=0)) == packs


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(300, 900), st.integers(1, 5), st.integers(0, 9))
def test_batches_by_tokens_lose_no_sample_and_suit_all_processes(
    lengths: list[int], tokens: int, processes: int, seed: int
) -> None:
    batches = list(group_by_tokens(lengths, tokens, processes, seed))
    assert batches == list(group_by_tokens(lengths, tokens, processes, seed))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[number] for number in batch) <= tokens for batch in batches)
    if any(len(batch) > 1 for batch in batches) or len(batches) % processes == 0:
        shares = [list(share) for share in _shares(batches, processes)]
        assert [batch for turn in zip(*shares, strict=True) for (batch,) in turn] == batches  # none twice


def _shares(batches: list[list[int]], processes: int) -> list[BatchSamplerShard]:
    """The batches of each process, as accelerate divides them."""
    sampler = BatchSampler(batches, batch_size=1, drop_last=False)  # type: ignore[arg-type]
    return [BatchSamplerShard(sampler, processes, process) for process in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_batches_by_tokens_are_full_and_of_similar_lengths(processes: int) -> None:
    lengths = [int(length) for length in np.random.default_rng(0).lognormal(6, 0.6, 10_000).clip(64, 2048)]
    batches = group_by_tokens(lengths, 8192, processes)
    sizes = np.array([sum(lengths[number] for number in batch) for batch in batches])
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert 1 - sizes.sum() / padded < 0.01  # of what attention sees, sample by sample
    assert np.median(sizes) > 0.95 * 8192
    assert sizes.mean() > 0.93 * 8192


def test_a_sample_that_is_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="--tokens_per_batch 100: the longest sample has 101 tokens"):
        group_by_tokens([100, 101], 100)
