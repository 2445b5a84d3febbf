"""Packing: which samples share a row, so that rows of a fixed capacity contain little or no padding.

The packs follow from the lengths in the manifest alone, without reading a row, and are the same in every process.
`minicpmv/packed.py` computes such rows.
"""

from collections.abc import Sequence

import numpy as np


def pack_samples(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
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
    order = np.random.default_rng(seed).permutation(len(lengths))
    # A binary tree over the packs: each node holds the largest free room below it, so the first pack with enough room
    # is found in log2(packs) steps.
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for number in sorted(order.tolist(), key=lambda number: -lengths[number]):
        length = min(lengths[number], capacity)
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs
