"""Samples are packed by first-fit decreasing: no sample is lost, and no pack holds more than its capacity."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.shards.packing import pack_samples


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
    assert pack_samples(lengths, 21, seed=5) == pack_samples(lengths, 21, seed=5)
    assert pack_samples(lengths, 21, seed=5) != pack_samples(lengths, 21, seed=6)


@pytest.mark.parametrize(("lengths", "packs"), [([], []), ([500], [[0]]), ([500, 3], [[0], [1]])])
def test_no_samples_and_samples_that_are_too_long(lengths: list[int], packs: list[list[int]]) -> None:
    assert pack_samples(lengths, 100, seed=0) == packs
