import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.packing import LengthGroupedSampler, plan_packs
from minicpmv_finetune.errors import UserError


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


def test_every_sample_is_in_one_pack_that_holds_it() -> None:
    lengths = _lengths(500)
    packs = plan_packs(lengths, 128, seed=1)
    assert sorted(number for pack in packs for number in pack) == list(range(500))
    assert max(sum(lengths[number] for number in pack) for pack in packs) <= 128
    # 11/9 of the fewest possible is the bound; real lengths stay far below.
    assert len(packs) <= 1.05 * sum(lengths) / 128


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 200), st.integers(0, 9))
def test_a_plan_loses_nobody_and_overfills_nothing(lengths: list[int], capacity: int, seed: int) -> None:
    packs = plan_packs(lengths, capacity, seed)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[number] for number in pack) <= capacity for pack in packs)


def test_packs_are_those_of_first_fit_decreasing() -> None:
    lengths = _lengths(60, longest=40)
    packs = plan_packs(lengths, 64, seed=3)
    order = [number for pack in packs for number in pack]
    longest_first = sorted(order, key=lambda number: -lengths[number])
    assert sorted(sorted(lengths[n] for n in pack) for pack in packs) == sorted(
        sorted(lengths[n] for n in pack) for pack in _first_fit(longest_first, lengths, 64)
    )


def test_the_seed_alone_decides_who_meets() -> None:
    lengths = [7] * 40
    assert plan_packs(lengths, 21, seed=5) == plan_packs(lengths, 21, seed=5)
    assert plan_packs(lengths, 21, seed=5) != plan_packs(lengths, 21, seed=6)


@pytest.mark.parametrize(("lengths", "packs"), [([], []), ([500], [[0]]), ([500, 3], [[0], [1]])])
def test_none_and_too_long_ones(lengths: list[int], packs: list[list[int]]) -> None:
    assert plan_packs(lengths, 100, seed=0) == packs


def test_batches_of_like_length_change_with_the_epoch_alone() -> None:
    lengths = _lengths(404)
    sampler, other = LengthGroupedSampler(lengths, 8, seed=0), LengthGroupedSampler(lengths, 8, seed=0)
    first = list(sampler)
    assert first == list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(404))
    batches, later = ([order[start : start + 8] for start in range(0, 404, 8)] for order in (first, second))
    assert not {frozenset(batch) for batch in batches} <= {frozenset(batch) for batch in later}
    longest = [max(lengths[number] for number in batch) for batch in batches]
    padding = 1 - sum(lengths) / sum(most * len(batch) for most, batch in zip(longest, batches, strict=True))
    assert padding < 0.05  # 0.43 in any order
    assert longest[0] > 0.9 * max(lengths)
    assert longest[1:] != sorted(longest[1:], reverse=True)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_samples_than_a_batch_are_all_there(count: int) -> None:
    assert sorted(LengthGroupedSampler([5] * count, 8, seed=0)) == list(range(count))


def test_packing_and_like_lengths_together_are_refused() -> None:
    flags = "--data_path x --output_dir y --use_cpu true --packing true --group_by_length"
    with pytest.raises(UserError, match="leave --group_by_length out"):
        parse(flags.split(), announce=lambda _: None)
