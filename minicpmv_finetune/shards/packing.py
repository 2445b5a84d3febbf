"""Packing: which samples share a row, so that rows of a fixed capacity contain little or no padding.

The packs follow from the lengths in the manifest alone, without reading a row, and are the same in every process.
`minicpmv/packed.py` computes such rows.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.errors import UserError

_AT_ONCE = 4096


class Packs(Sequence[list[int]]):
    """Groups of samples, as the numbers of their samples: four bytes a sample in memory, where lists need a hundred."""

    def __init__(self, packs: Iterable[Sequence[int]]) -> None:
        self._numbers, self._ends = array("i"), array("q", [0])
        for pack in packs:
            self._numbers.extend(pack)
            self._ends.append(len(self._numbers))

    @classmethod
    def by_number(cls, samples: NDArray[np.int64], pack: NDArray[np.int32]) -> "Packs":
        """Group samples by the numbers of their packs, from 0 and all used; the samples of a pack stay in order."""
        order = np.argsort(pack, kind="stable")
        ends = np.bincount(pack).cumsum().tolist()
        return cls(samples[order[start:end]].tolist() for start, end in pairwise([0, *ends]))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: Any) -> Any:
        number = range(len(self))[place]
        return self._numbers[self._ends[number] : self._ends[number + 1]].tolist()


def one_by_one(numbers: NDArray[np.integer[Any]]) -> Iterator[int]:
    """The numbers as Python's, not all of them at once."""
    for start in range(0, len(numbers), _AT_ONCE):
        yield from numbers[start : start + _AT_ONCE].tolist()


def _longest_first(lengths: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The numbers of the samples by their length; the seed decides about equally long ones."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    return order[np.argsort(-lengths[order], kind="stable")]


def pack_samples(lengths: Sequence[int], capacity: int, seed: int = 0) -> Packs:
    """Distribute samples over packs by first-fit decreasing.

    Each sample, longest first, goes into the first pack that has room for it. The number of packs is at most 11/9 of
    the smallest possible number plus 6/9 (Dósa, 2007); for the lengths of real data it is rarely more than one above
    the smallest possible number.

    Args:
        lengths: Number of tokens of each sample.
        capacity: Number of tokens that a pack can hold; a longer sample gets a pack of its own.
        seed: Determines which of several equally long samples come together. The number of packs does not depend on it.

    Returns:
        The packs, each as the numbers of its samples.
    """
    order = _longest_first(np.asarray(lengths, np.int64), seed)
    # A binary tree over the packs: each node holds the largest free room below it, so the first pack with enough room
    # is found in log2(packs) steps.
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = array("q", [capacity]) * (2 * leaves)
    packs = array("i")  # number of each sample's pack, in their order
    for number in one_by_one(order):
        length = min(lengths[number], capacity)
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        packs.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return Packs.by_number(order, np.asarray(packs))


def group_by_tokens(lengths: Sequence[int], tokens: int, multiple: int = 1, seed: int = 0) -> Packs:
    """Distribute samples over batches of a limited number of tokens; the samples of a batch have similar lengths.

    The limit holds for the number of samples times the length of the longest one. So it also bounds what operations
    between tokens need, which process each sample of a packed row in a row of its own, padded to the longest one.

    Args:
        lengths: Number of tokens of each sample.
        tokens: Largest number of tokens of a batch.
        multiple: Number of processes; it divides the number of batches, unless each has one sample only. So no process
            repeats a batch while the others compute their last one.
        seed: Determines which of several equally long samples come together. The number of batches does not depend on
            it.

    Returns:
        The batches, each as the numbers of its samples.

    Raises:
        UserError: A sample is longer than a batch.
    """
    longest = max(lengths, default=0)
    if longest > tokens:
        raise UserError(
            f"--tokens_per_batch {tokens}: the longest sample has {longest:,} tokens; give at least that number, or "
            "preprocess with a smaller model_max_length."
        )
    order = _longest_first(np.asarray(lengths, np.int64), seed)
    batches: list[range] = []  # of places in this order
    while (start := batches[-1].stop if batches else 0) < len(order):
        batches.append(range(start, min(start + tokens // lengths[order[start]], len(order))))
    while len(batches) % multiple and any(len(batch) > 1 for batch in batches):
        place = max(range(len(batches)), key=lambda place: len(batches[place]))
        batch, half = batches[place], len(batches[place]) // 2
        batches[place] = batch[:half]
        batches.append(batch[half:])
    return Packs(order[batch.start : batch.stop].tolist() for batch in batches)
