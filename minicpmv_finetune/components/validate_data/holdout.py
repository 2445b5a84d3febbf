"""Which samples are held out for evaluation when no evaluation data is given.

Samples that share an image, also by way of others, are one group and stay on one side. A group's smallest image
hash, together with the seed, decides its side. So the split depends on neither order nor addresses, and appended
samples move no other: unless one of them shows an old image beside a new one with a smaller hash, or joins two
groups; then a group may change sides as a whole, because leaking it would be worse.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.errors import UserError

from .inventory import Inventory, numbered


def hold_out(inventory: Inventory, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Whether each sample is for evaluation.

    Args:
        inventory: the samples.
        fraction: share of the groups to hold out; 0 holds out none.
        seed: of the choice.

    Raises:
        UserError: one of both sides would be empty.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    samples, shown = len(inventory), inventory.shown()
    if fraction <= 0:
        return np.zeros(samples, bool)
    first, image = numbered(shown["sha256"])
    # A graph of samples and, behind them, images.
    nodes = samples + len(first)
    links = coo_array((np.ones(len(shown), bool), (shown["sample"].astype(np.int64), samples + image)), (nodes, nodes))
    groups, group = connected_components(links, directed=False)
    subject = np.full(groups, len(first))
    np.minimum.at(subject, group[samples:], np.arange(len(first)))  # images are numbered in their hashes' order
    _, example = np.unique(group[:samples], return_index=True)  # a sample of each group
    sizes = np.bincount(group[:samples], minlength=groups)
    hashes, digests = shown["sha256"], inventory.digests()
    goes = np.zeros(groups, bool)
    for number in range(groups):
        has_image = subject[number] < len(first)
        decisive = hashes[first[subject[number]]] if has_image else digests[example[number]]
        # A group of most samples is what there is to learn, whatever its draw.
        goes[number] = sizes[number] <= samples / 2 and _draw(seed, decisive.tobytes()) < fraction
    is_held_out = goes[group[:samples]]
    if is_held_out.all() or not is_held_out.any():
        largest = int(sizes.max())
        shared = f" ({largest:,} of them share images, and stay together)" if largest > 1 else ""
        raise UserError(
            f"{samples:,} samples are too few to split off {fraction:.0%} for evaluation{shared}; give evaluation "
            "data of its own."
        )
    return is_held_out


def _draw(seed: int, subject: bytes) -> float:
    """A number from 0 to 1 that follows from the seed and the subject alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{subject.hex()}".encode()).digest()[:8]) / 2**64
