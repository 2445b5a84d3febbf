"""Decide which samples are held out for evaluation when no evaluation data is given.

Samples that share an image, directly or through other samples, form a group, and a group is not split. The smallest
image hash of a group and the seed decide where the group goes. So the split depends on neither order nor addresses,
and appended samples do not move others, with one exception: if a new sample shows an old image beside a new one with
a smaller hash, or joins two groups, the whole group may move, because leaking it into both splits would be worse.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.errors import UserError

from .inventory import Inventory


def hold_out(inventory: Inventory, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Whether each sample is held out for evaluation.

    Args:
        inventory: The samples.
        fraction: Share of the groups to hold out; 0 holds out none.
        seed: Seed of the choice.

    Raises:
        UserError: The training or the evaluation split would be empty.
    """
    samples, rows = len(inventory), inventory.image_rows()
    if fraction <= 0:
        return np.zeros(samples, bool)
    first, image = inventory.distinct_images
    group = np.full(samples, -1, np.int32)  # number of the group's smallest image; a sample without images is alone
    shown_together = np.flatnonzero(rows["sample"][1:] == rows["sample"][:-1])
    smallest = _smallest_connected(len(first), image[shown_together], image[shown_together + 1])
    group[rows["sample"]] = smallest[image]
    has_image = group >= 0
    sizes = np.bincount(group[has_image], minlength=len(first))
    # A group of more than half of the samples is always trained on.
    open_groups = np.flatnonzero((sizes > 0) & (sizes <= samples / 2))
    held_out_groups = np.zeros(len(first), bool)
    held_out_groups[open_groups] = _are_drawn(rows["sha256"], first[open_groups], fraction, seed)
    is_held_out = np.zeros(samples, bool)
    is_held_out[has_image] = held_out_groups[group[has_image]]
    if samples > 1:
        is_held_out[~has_image] = _are_drawn(inventory.digests(), np.flatnonzero(~has_image), fraction, seed)
    if is_held_out.all() or not is_held_out.any():
        largest = int(sizes.max(initial=1))
        shared = f" ({largest:,} of them share images and stay together)" if largest > 1 else ""
        raise UserError(
            f"{samples:,} samples are too few to split off {fraction:.0%} for evaluation{shared}; give separate "
            "evaluation data."
        )
    return is_held_out


def _smallest_connected(count: int, one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int32]:
    """The smallest number that each of some numbers is connected with, directly or through others.

    In each round every number that has a smaller neighbor is joined with its smallest one. What is left of a group of
    connected numbers is halved in two rounds, so that there are few rounds also for long chains.

    Args:
        count: The numbers are those below it.
        one: One number of each pair that is connected.
        other: The other number of each pair.
    """
    smallest = np.arange(count, dtype=np.int32)
    while len(one):
        one, other = smallest[one], smallest[other]
        is_open = one != other
        one, other = one[is_open], other[is_open]
        np.minimum.at(smallest, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(smaller := smallest[smallest], smallest):
            smallest = smaller
    return smallest


def _are_drawn(
    hashes: NDArray[np.uint64], places: NDArray[np.integer[Any]], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Whether the hash at each of some places is drawn."""
    drawn = (_draw(seed, hashes[place].tobytes()) < fraction for place in places)
    return np.fromiter(drawn, bool, len(places))


def _draw(seed: int, key: bytes) -> float:
    """A number from 0 to 1 that only the seed and the key determine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key.hex()}".encode()).digest()[:8]) / 2**64
