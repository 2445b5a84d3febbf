"""Find images that occur more than once: the same bytes at several addresses, or a copy that looks the same.

A copy may be rescaled, recompressed, a little cropped, or brighter or darker. It is found in two steps.

First, by a hash of 128 bits: whether each cell of an 8 × 8 grid is brighter than its right and its lower neighbor. Two
hashes that differ in at most seven bits agree in one of their eight 16-bit parts, so only images that agree in a part
are compared, and time grows with the number of images, not of pairs. Where many images have the same hash, a few of
the same coarse colors and of similar brightness are compared.

Then two images look the same if one, in 16 × 16 pixels, is explained by the other: moved and scaled by less than a
pixel, as after a small crop, with a little more or less contrast. Color takes part in it like brightness, so hearts
or flags of different colors are different images. Images without structure, such as blank pages, would all be copies
of each other, and are excluded.
"""

import math
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
_MAX_DISTANCE = 20  # bits; the bands find every pair up to a distance of 7, and many beyond
_MIN_EXPLAINED = 0.985  # share of an image's variance that a copy explains
_MIN_SIMILARITY = 0.9  # cosine of two images above which a small crop may be the difference
_MAX_GAIN = 1.4  # ratio of the contrasts of two copies
_MIN_CONTRAST = 4.0  # standard deviation of the levels of a color channel
_BRIGHTER_BY = 4  # gray levels; smaller differences are compression noise
_COLORED_FROM = 12  # levels of Cb and Cr from gray; less is compression noise
_WINDOW = 64  # most images compared with each image in a band, even if more agree in it
_NEIGHBORS = 4  # images of the same hash compared with each image
_CHUNK = 4096  # images
_COMPARED_CHUNK = 512  # pairs of images
# From RGB to brightness (Y) and color (Cb, Cr), as in JPEG; gray is 0 in both Cb and Cr.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
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
    hashes = np.zeros((len(first), 3), np.uint64)
    brightness = np.zeros(len(first), np.float32)
    has_structure = np.zeros(len(first), bool)
    for start in range(0, len(first), _CHUNK):
        place = slice(start, start + _CHUNK)
        pixels = inventory.read_miniatures(first[place])
        planes = pixels @ _YCC.T
        hashes[place] = _hashes(planes)
        brightness[place] = planes[..., 0].mean(axis=(1, 2))
        has_structure[place] = (pixels.std(axis=(1, 2)) >= _MIN_CONTRAST).any(axis=1)
    kept = np.flatnonzero(has_structure)
    candidates = kept[_candidates(hashes[kept], brightness[kept])]
    near = [np.zeros((0, 2), np.intp)]
    for start in range(0, len(candidates), _COMPARED_CHUNK):
        chunk = candidates[start : start + _COMPARED_CHUNK]
        one, other = (inventory.read_miniatures(first[chunk[:, side]]) @ _YCC.T for side in (0, 1))
        near.append(chunk[_look_the_same(one, other)])
    return np.concatenate(near)


def _hashes(planes: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Hashes of images in Y, Cb and Cr, [images, 3]: 128 bits of brightness, and 64 bits of color."""
    cells = planes[..., 0].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    brighter = np.stack([cells - np.roll(cells, -1, axis) > _BRIGHTER_BY for axis in (2, 1)], axis=1)
    colors = planes[..., 1:].reshape(-1, 4, 4, 4, 4, 2).mean(axis=(2, 4))
    colored = np.stack([colors > _COLORED_FROM, colors < -_COLORED_FROM], axis=-1)
    bits = np.concatenate([part.reshape(len(planes), -1) for part in (brighter, colored)], axis=1)
    return np.packbits(bits, axis=1).view(np.uint64).reshape(-1, 3)


def _candidates(hashes: NDArray[np.uint64], brightness: NDArray[np.float32]) -> NDArray[np.intp]:
    """Pairs of images that may be near-equal: with the same hash, or with one that differs in a few bits."""
    order = np.lexsort((brightness, *hashes.T))
    same = (hashes[order][1:] == hashes[order][:-1]).all(axis=1)
    is_new = np.concatenate([np.ones(min(len(order), 1), bool), ~same])
    group = np.cumsum(is_new) - 1
    # Each image is compared with the first one of the same hash, and with its neighbors in brightness; only these
    # first ones are compared with other hashes.
    unique = order[is_new]
    pairs = [np.stack([unique[group], order], axis=1)[~is_new]]
    for shift in range(1, _NEIGHBORS + 1):
        agree = group[:-shift] == group[shift:]
        pairs.append(np.stack([order[:-shift][agree], order[shift:][agree]], axis=1))
    distinct, colors = hashes[unique, :2], hashes[unique, 2]
    for band in range(128 // _BAND):
        part = (distinct[:, band // 4] >> np.uint64(_BAND * (band % 4))) & np.uint64(2**_BAND - 1)
        ordered = np.lexsort((colors, distinct[:, 1], distinct[:, 0], part))
        for shift in range(1, _WINDOW + 1):
            agree = part[ordered[:-shift]] == part[ordered[shift:]]
            if not agree.any():
                break
            one, other = ordered[:-shift][agree], ordered[shift:][agree]
            distance = np.bitwise_count(distinct[one] ^ distinct[other]).sum(axis=1)
            close = distance <= _MAX_DISTANCE
            pairs.append(np.stack([unique[one[close]], unique[other[close]]], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def _look_the_same(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether the two images of each pair look the same; both are in Y, Cb and Cr, [pairs, 16, 16, 3]."""
    one, other = _without_mean_brightness(one), _without_mean_brightness(other)
    lengths = [np.sqrt((planes**2).sum(axis=(1, 2, 3))) for planes in (one, other)]
    cosine = (one * other).sum(axis=(1, 2, 3)) / (lengths[0] * lengths[1])
    alike = np.abs(np.log(lengths[0] / lengths[1])) <= np.log(_MAX_GAIN)
    found = alike & (cosine >= np.sqrt(_MIN_EXPLAINED))
    places = np.flatnonzero(alike & ~found & (cosine >= _MIN_SIMILARITY))
    found[places] = _explains(one[places], other[places]) | _explains(other[places], one[places])
    return found


def _without_mean_brightness(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    centered = planes.copy()
    centered[..., 0] -= centered[..., 0].mean(axis=(1, 2), keepdims=True)
    return centered


def _explains(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each image of `other` is its image of `one` with another contrast, moved and scaled a little.

    To first order, a small move or scaling adds a multiple of the image's slope, constant or growing along the axis.
    The multiples and the contrast are fitted by least squares.
    """
    size = math.prod(one.shape[1:])
    down, right = np.gradient(one, axis=(1, 2))
    along = np.linspace(-1, 1, one.shape[1], dtype=np.float32)
    rows, columns = along[:, None, None], along[None, :, None]
    terms = np.stack([one, down, right, down * rows, right * columns], axis=1).reshape(len(one), 5, size)
    target = other.reshape(len(other), size, 1)
    products = (terms @ terms.transpose(0, 2, 1)).astype(np.float64)
    # An image that is constant along an axis has no slope there, and its products no inverse.
    damping = 1e-6 * np.trace(products, axis1=1, axis2=2)[:, None, None] * np.eye(5)
    factors = np.linalg.solve(products + damping, (terms @ target).astype(np.float64))
    unexplained = ((target - terms.transpose(0, 2, 1) @ factors) ** 2).sum(axis=(1, 2))
    is_copy: NDArray[np.bool_] = unexplained <= (1 - _MIN_EXPLAINED) * (target**2).sum(axis=(1, 2))
    return is_copy
