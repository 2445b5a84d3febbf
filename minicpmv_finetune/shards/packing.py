"""Packing: which samples share a row, so that rows of a fixed capacity contain little or no padding.

The packs follow from the lengths in the manifest alone, without reading a row, and are the same in every process.
`minicpmv/packed.py` computes such rows.
"""

from collections.abc import Sequence

import numpy as np

from minicpmv_finetune.errors import UserError


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


def group_by_tokens(lengths: Sequence[int], tokens: int, multiple: int = 1, seed: int = 0) -> list[list[int]]:
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
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches: list[list[int]] = []
    room = 0  # number of samples that the last batch still takes
    for number in sorted(order.tolist(), key=lambda number: -lengths[number]):
        if not room:
            batches.append([])
            room = tokens // lengths[number]
        batches[-1].append(number)
        room -= 1
    while len(batches) % multiple and any(len(batch) > 1 for batch in batches):
        largest = max(batches, key=len)
        half = len(largest) // 2
        batches.append(largest[half:])
        del largest[half:]
    return batches
