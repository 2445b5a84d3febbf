"""Decide which samples are held out for evaluation when no evaluation data is given.

Samples that share an image, directly or through other samples, form a group, and a group is not split. The smallest
image hash of a group and the seed decide where the group goes. So the split depends on neither order nor addresses,
and appended samples do not move others, with one exception: if a new sample shows an old image beside a new one with
a smaller hash, or joins two groups, the whole group may move, because leaking it into both splits would be worse.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.errors import UserError

from .inventory import Inventory, numbered


def hold_out(inventory: Inventory, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Whether each sample is held out for evaluation.

    Args:
        inventory: The samples.
        fraction: Share of the groups to hold out; 0 holds out none.
        seed: Seed of the choice.

    Raises:
        UserError: The training or the evaluation split would be empty.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    samples, images = len(inventory), inventory.image_rows()
    if fraction <= 0:
        return np.zeros(samples, bool)
    first, image = numbered(images["sha256"])
    # The nodes of the graph are the samples, followed by the distinct images.
    nodes = samples + len(first)
    links = coo_array(
        (np.ones(len(images), bool), (images["sample"].astype(np.int64), samples + image)), (nodes, nodes)
    )
    groups, group = connected_components(links, directed=False)
    smallest = np.full(groups, len(first))  # number of the image with the smallest hash in each group
    np.minimum.at(smallest, group[samples:], np.arange(len(first)))  # images are numbered in the order of their hashes
    _, example = np.unique(group[:samples], return_index=True)  # one sample of each group
    sizes = np.bincount(group[:samples], minlength=groups)
    hashes, digests = images["sha256"], inventory.digests()
    held_out_groups = np.zeros(groups, bool)
    for number in range(groups):
        has_image = smallest[number] < len(first)
        key = hashes[first[smallest[number]]] if has_image else digests[example[number]]
        # A group of more than half of the samples is always trained on.
        held_out_groups[number] = sizes[number] <= samples / 2 and _draw(seed, key.tobytes()) < fraction
    is_held_out = held_out_groups[group[:samples]]
    if is_held_out.all() or not is_held_out.any():
        largest = int(sizes.max())
        shared = f" ({largest:,} of them share images and stay together)" if largest > 1 else ""
        raise UserError(
            f"{samples:,} samples are too few to split off {fraction:.0%} for evaluation{shared}; give separate "
            "evaluation data."
        )
    return is_held_out


def _draw(seed: int, key: bytes) -> float:
    """A number from 0 to 1 that only the seed and the key determine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key.hex()}".encode()).digest()[:8]) / 2**64
