"""Find images that occur more than once: the same bytes at several addresses, or a rescaled or recompressed copy.

Copies are found by a hash of 128 bits: whether each cell of an 8 × 8 grid is brighter than its right and its lower
neighbor. Two hashes that differ in at most seven bits agree in one of their eight 16-bit parts, so only images that
agree in a part are compared, and time grows with the number of images, not of pairs. A pair is near-equal when the
16 × 16 gray levels of both images also correlate almost perfectly. Images without structure, such as blank pages,
would all be copies of each other, and are excluded.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.data.samples import Split

from .inventory import Inventory, numbered

_BAND = 16  # bits
_MAX_DISTANCE = 128 // _BAND - 1  # bits; the bands find every pair up to this distance
_MIN_CORRELATION = 0.99
_MIN_CONTRAST = 4.0  # standard deviation of gray levels
_BRIGHTER_BY = 4  # gray levels; smaller differences are compression noise
_WINDOW = 64  # most images compared with each image in a band, even if more agree in it
_CHUNK = 4096  # images
_LISTED_ROWS = 10


class Appearance(BaseModel):
    """An address at which a repeated image occurs."""

    model_config = ConfigDict(frozen=True)

    uri: str
    split: Split
    sample: str = Field(description="Id of the first sample that shows the image.")


class Repetition(BaseModel):
    """A line of `duplicates.jsonl`: an image that occurs more than once."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["equal", "near"]
    leaks: bool = Field(description="Whether the image is in both training and evaluation data.")
    count: int = Field(description="Number of addresses, each counted once for each split.")
    appearances: tuple[Appearance, ...] = Field(description="The first addresses.")


@dataclass(frozen=True)
class Group:
    """Images that are equal or near-equal.

    Attributes:
        kind: Whether the images are equal or near-equal.
        leaks: Whether the images are in both training and evaluation data.
        count: Number of addresses, each counted once for each split.
        rows: The first images of each split, as rows of `Inventory.image_rows`.
    """

    kind: Literal["equal", "near"]
    leaks: bool
    count: int
    rows: tuple[int, ...]


def find_repeated(inventory: Inventory, is_eval: NDArray[np.bool_]) -> tuple[list[Group], Counter[str]]:
    """Find images that occur more than once.

    Args:
        inventory: The accepted samples.
        is_eval: Whether each sample is for evaluation.

    Returns:
        The groups, those that leak from training to evaluation first; and counts by code: `equal_pictures` and
        `near_equal_pictures` (images that have a copy), `leaked_equal` and `leaked_near` (evaluation samples with an
        image that is in the training data too), `duplicate_samples` (samples equal to an earlier one of their split).
    """
    rows = inventory.image_rows()
    first, image = numbered(rows["sha256"])
    in_eval = is_eval[rows["sample"]]
    pairs = _near_pairs(inventory, first)
    groups = [
        *_groups("equal", image, rows["address"], in_eval),
        *_groups("near", _connected(len(first), pairs)[image], rows["address"], in_eval, image),
    ]
    counts: Counter[str] = Counter()
    has_train = np.bincount(image[~in_eval], minlength=len(first)) > 0
    near_train = np.zeros(len(first), bool)
    for one, other in (pairs.T, pairs.T[::-1]):
        near_train[one[has_train[other]]] = True
    leaked = np.unique(rows["sample"][in_eval & has_train[image]])
    near_leaked = np.unique(rows["sample"][in_eval & near_train[image]])
    counts["leaked_equal"] = len(leaked)
    counts["leaked_near"] = len(np.setdiff1d(near_leaked, leaked))
    counts["equal_pictures"] = sum(group.kind == "equal" for group in groups)
    counts["near_equal_pictures"] = len(np.unique(pairs))
    digests = inventory.digests()
    for split in (~is_eval, is_eval):
        counts["duplicate_samples"] += int(split.sum()) - len(numbered(digests[split])[0])
    return sorted(groups, key=lambda group: (not group.leaks, group.rows)), counts


def _groups(
    kind: Literal["equal", "near"],
    group: NDArray[np.intp],
    address: NDArray[np.uint64],
    in_eval: NDArray[np.bool_],
    image: NDArray[np.intp] | None = None,
) -> Iterator[Group]:
    """The groups with more than one address or split; a group of near-equal images also has more than one image."""
    order = np.lexsort((address, in_eval, group))
    keys = np.stack([group[order], in_eval[order], address[order].astype(np.int64)])
    is_new = np.ones(len(order), bool)
    is_new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    rows = order[is_new]  # one row for each address and split of a group
    starts = np.flatnonzero(np.diff(group[rows], prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(rows)]):
        if end - start < 2:
            continue
        members = rows[start:end]
        if image is not None and len(np.unique(image[members])) < 2:
            continue
        sides = [np.sort(members[in_eval[members] == side]) for side in (False, True)]
        listed = np.concatenate([side[:_LISTED_ROWS] for side in sides])
        yield Group(kind, all(map(len, sides)), len(members), tuple(listed.tolist()))


def _connected(number: int, pairs: NDArray[np.intp]) -> NDArray[np.intp]:
    """The group of each of `number` images, where the two images of each pair belong to one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (number, number))
    return connected_components(links, directed=False)[1].astype(np.intp) if number else np.zeros(0, np.intp)


def _near_pairs(inventory: Inventory, first: NDArray[np.intp]) -> NDArray[np.intp]:
    """Pairs of near-equal images by their numbers, [pairs, 2]; `first` is a row of each image."""
    hashes = np.zeros((len(first), 2), np.uint64)
    has_structure = np.zeros(len(first), bool)
    for start in range(0, len(first), _CHUNK):
        grays = inventory.read_grays(first[start : start + _CHUNK])
        hashes[start : start + _CHUNK] = _hashes(grays)
        has_structure[start : start + _CHUNK] = grays.std(axis=(1, 2)) >= _MIN_CONTRAST
    kept = np.flatnonzero(has_structure)
    candidates = kept[_candidates(hashes[kept])]
    near = [np.zeros((0, 2), np.intp)]
    for start in range(0, len(candidates), _CHUNK):
        chunk = candidates[start : start + _CHUNK]
        one, other = (inventory.read_grays(first[chunk[:, side]]) for side in (0, 1))
        near.append(chunk[_correlation(one, other) >= _MIN_CORRELATION])
    return np.concatenate(near)


def _hashes(grays: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A hash of 128 bits for each image, [images, 2]."""
    cells = grays.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    bits = np.stack([cells - np.roll(cells, -1, axis) > _BRIGHTER_BY for axis in (2, 1)], axis=1)
    return np.packbits(bits.reshape(len(grays), -1), axis=1).view(np.uint64).reshape(-1, 2)


def _candidates(hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Pairs of hashes that differ in at most seven bits."""
    order = np.lexsort(hashes.T)
    is_new = np.ones(len(order), bool)
    is_new[1:] = (hashes[order][1:] != hashes[order][:-1]).any(axis=1)
    # Each image is compared with the first one of the same hash; only these first ones are compared further.
    unique = order[is_new]
    pairs = [np.stack([unique[np.cumsum(is_new) - 1], order], axis=1)[~is_new]]
    distinct = hashes[unique]
    for band in range(128 // _BAND):
        part = (distinct[:, band // 4] >> np.uint64(_BAND * (band % 4))) & np.uint64(2**_BAND - 1)
        ordered = np.lexsort((distinct[:, 1], distinct[:, 0], part))
        for shift in range(1, _WINDOW + 1):
            agree = part[ordered[:-shift]] == part[ordered[shift:]]
            if not agree.any():
                break
            one, other = ordered[:-shift][agree], ordered[shift:][agree]
            distance = np.bitwise_count(distinct[one] ^ distinct[other]).sum(axis=1)
            close = distance <= _MAX_DISTANCE
            pairs.append(np.stack([unique[one[close]], unique[other[close]]], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def _correlation(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Pearson correlation of each pair of images, which is independent of their brightness and contrast."""
    left, right = (grays.reshape(len(grays), -1).astype(np.float64) for grays in (one, other))
    left -= left.mean(axis=1, keepdims=True)
    right -= right.mean(axis=1, keepdims=True)
    return (left * right).sum(axis=1) / np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
