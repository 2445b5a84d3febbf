"""Find images that look the same: a copy may be rescaled, recompressed, a little cropped, or brighter or darker.

First, candidates are found by a hash of 128 bits: whether each cell of an 8 × 8 grid is brighter than its right and its
lower neighbor. Two hashes that differ in at most seven bits agree in one of their eight 16-bit parts, so only images
that agree in a part are compared, and time grows with the number of images, not of pairs. Where many images have the
same hash, a few of the same coarse colors and of similar brightness are compared.

Then two images look the same if one, in 16 × 16 pixels, is explained by the other: moved and scaled by less than a
pixel, as after a small crop, with a little more or less contrast. Color takes part in it like brightness, so hearts
or flags of different colors are different images. Images without structure, such as blank pages, would all be copies
of each other, and are excluded.

Where thousands of images are copies of each other, most comparisons would say nothing new. So images that are connected
by other copies are compared only if that may show a leak from training to evaluation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .inventory import Inventory

_BAND = 16  # bits
_BANDS = 128 // _BAND
_MAX_DISTANCE = 20  # bits; the bands find every pair up to a distance of 7, and many beyond
_MIN_EXPLAINED = 0.985  # share of an image's variance that a copy explains
_MIN_SIMILARITY = 0.9  # cosine of two images above which a small crop may be the difference
_MAX_GAIN = 1.4  # ratio of the contrasts of two copies
_MIN_CONTRAST = 4.0  # standard deviation of the levels of a color channel
_BRIGHTER_BY = 4  # gray levels; smaller differences are compression noise
_COLORED_FROM = 12  # levels of Cb and Cr from gray; less is compression noise
_WINDOW = 64  # most images compared with each image in a band, even if more agree in it
_NEIGHBORS = 4  # images of the same hash compared with each image
_CHUNK = 256  # images that are hashed at once
_BLOCK = 128  # images that are compared with the images that follow them, at once
_BLOCKS = 8  # whose hashes are compared at once
# From RGB to brightness (Y) and color (Cb, Cr), as in JPEG; gray is 0 in both Cb and Cr.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)

_HASH = np.dtype((np.uint64, 3))
_DESCRIBED = np.dtype([("hash", _HASH), ("brightness", np.float32), ("has_structure", bool)])

Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]  # numbers of the two images of each pair


@dataclass(frozen=True)
class NearEqual:
    """What was found.

    Attributes:
        group: The first image of each image's group; images that look the same, or are connected by such images, are in
            one.
        has_copy: Whether each image looks the same as another one.
        leaks: Whether each image looks the same as one that is in the training data.
        is_partial: Whether each image was compared with some of the images only that resemble it.
    """

    group: NDArray[np.int32]
    has_copy: NDArray[np.bool_]
    leaks: NDArray[np.bool_]
    is_partial: NDArray[np.bool_]


def find_near_equal(
    inventory: Inventory, first: NDArray[np.int32], in_train: NDArray[np.bool_], in_eval: NDArray[np.bool_]
) -> NearEqual:
    """Find the images that look the same.

    Args:
        inventory: The accepted samples.
        first: A row of `Inventory.image_rows` for each image.
        in_train: Whether each image is in the training data.
        in_eval: Whether each image is in the evaluation data.
    """
    search = _Search(inventory, first, in_train, in_eval)
    hashes, order = _sorted_by_hash(inventory, first)
    is_new = np.ones(len(order), bool)
    for start in range(0, len(order), _CHUNK):
        some = hashes[order[start : start + _CHUNK + 1]]
        is_new[start + 1 : start + len(some)] = (some[1:] != some[:-1]).any(axis=1)
    for pairs in _pairs_of_one_hash(order, is_new):
        search.compare(pairs)
    order = order[is_new]
    distinct = inventory.stored("distinct hashes", _HASH, (hashes[some] for some in _chunks(order)))
    for pairs in _pairs_of_close_hashes(distinct, order, search.is_partial):
        search.compare(pairs)
    return NearEqual(search.groups(), search.has_copy, search.leaks, search.is_partial)


class _Search:
    """The pairs that were found so far."""

    def __init__(
        self,
        inventory: Inventory,
        first: NDArray[np.int32],
        in_train: NDArray[np.bool_],
        in_eval: NDArray[np.bool_],
    ) -> None:
        self._inventory, self._first, self._in_train, self._in_eval = inventory, first, in_train, in_eval
        # Of each image in the tree of its group; the root's is the root itself.
        self._parent = np.arange(len(first), dtype=np.int32)
        self.has_copy, self.leaks, self.is_partial = np.zeros((3, len(first)), bool)

    def compare(self, pairs: Pairs) -> None:
        """Compare the images of each pair, unless that can show nothing new."""
        one, other = pairs
        is_open = self._roots(one) != self._roots(other)
        is_open |= self._may_leak(one, other) | self._may_leak(other, one)
        one, other = one[is_open], other[is_open]
        if not len(one):
            return
        images, places = np.unique(np.stack([one, other]), return_inverse=True)
        planes = self._inventory.read_miniatures(self._first[images]) @ _YCC.T
        found = _look_the_same(planes, *places.reshape(2, -1))
        one, other = one[found], other[found]
        self.has_copy[one] = self.has_copy[other] = True
        self.leaks[one[self._in_train[other]]] = True
        self.leaks[other[self._in_train[one]]] = True
        for pair in zip(one.tolist(), other.tolist(), strict=True):
            low, high = sorted(map(self._root, pair))
            self._parent[high] = low

    def groups(self) -> NDArray[np.int32]:
        """The first image of each image's group."""
        return self._roots(np.arange(len(self._parent)))

    def _roots(self, images: NDArray[np.intp]) -> NDArray[np.int32]:
        roots = self._parent[images]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[images] = roots  # so that the next search is short
        return roots

    def _root(self, image: int) -> int:
        parent = self._parent
        while (above := parent[image]) != image:
            parent[image] = parent[above]
            image = above
        return int(image)

    def _may_leak(self, one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.bool_]:
        may: NDArray[np.bool_] = self._in_eval[one] & ~self.leaks[one] & self._in_train[other]
        return may


def _sorted_by_hash(inventory: Inventory, first: NDArray[np.int32]) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """The hashes of all images, [images, 3]; and those images that have structure, in the order of their hashes."""
    described = (_describe(inventory.read_miniatures(rows)) for rows in _chunks(first))
    images = inventory.stored("hashes", _DESCRIBED, described)
    order = np.lexsort((images["brightness"], *images["hash"].T[::-1])).astype(np.int32)
    return images["hash"], order[images["has_structure"][order]]


def _chunks(values: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _describe(pixels: NDArray[np.uint8]) -> NDArray[np.void]:
    """What the search for candidates needs of images, [images, 16, 16, 3]."""
    described = np.empty(len(pixels), _DESCRIBED)
    planes = pixels @ _YCC.T
    described["hash"] = _hashes(planes)
    described["brightness"] = planes[..., 0].mean(axis=(1, 2))
    described["has_structure"] = _has_structure(pixels)
    return described


def _has_structure(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the levels of a color channel have a standard deviation of `_MIN_CONTRAST`, in [images, 16, 16, 3]."""
    levels = pixels.reshape(len(pixels), -1, 3).transpose(0, 2, 1).astype(np.float32, order="C")
    count = levels.shape[2]
    # Both sums are exact: integers below 2**24.
    sums, squares = levels.sum(axis=2), np.einsum("icp,icp->ic", levels, levels)
    variances = squares.astype(np.float64) / count - (sums.astype(np.float64) / count) ** 2
    has_contrast: NDArray[np.bool_] = (variances >= _MIN_CONTRAST**2).any(axis=1)
    return has_contrast


def _hashes(planes: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Hashes of images in Y, Cb and Cr, [images, 3]: 128 bits of brightness, and 64 bits of color."""
    cells = planes[..., 0].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    brighter = np.stack([cells - np.roll(cells, -1, axis) > _BRIGHTER_BY for axis in (2, 1)], axis=1)
    colors = planes[..., 1:].reshape(-1, 4, 4, 4, 4, 2).mean(axis=(2, 4))
    colored = np.stack([colors > _COLORED_FROM, colors < -_COLORED_FROM], axis=-1)
    bits = np.concatenate([part.reshape(len(planes), -1) for part in (brighter, colored)], axis=1)
    return np.packbits(bits, axis=1).view(np.uint64).reshape(-1, 3)


def _pairs_of_one_hash(order: NDArray[np.int32], is_new: NDArray[np.bool_]) -> Iterator[Pairs]:
    """Each image with the first one of the same hash, and with the next ones in brightness.

    Args:
        order: Numbers of the images, in the order of their hashes.
        is_new: Whether an image in this order is the first one of its hash.
    """
    starts = np.flatnonzero(is_new)
    group = np.append(np.cumsum(is_new, dtype=np.int32) - 1, np.full(_NEIGHBORS, -1, np.int32))
    for begin in range(0, len(order), _BLOCK):
        places = np.arange(begin, min(begin + _BLOCK, len(order)))
        start = starts[group[places]]
        places, start = places[start < places], start[start < places]
        pairs = [(start, places)]
        for shift in range(1, _NEIGHBORS + 1):
            agree = group[places + shift] == group[places]
            pairs.append((places[agree], places[agree] + shift))
        one, other = (order[np.concatenate(side)] for side in zip(*pairs, strict=True))
        if len(one):
            yield one, other


def _pairs_of_close_hashes(
    hashes: NDArray[np.uint64], images: NDArray[np.int32], is_partial: NDArray[np.bool_]
) -> Iterator[Pairs]:
    """Images whose hashes differ in a few bits, each pair once.

    Args:
        hashes: Different hashes in their order, [images, 3].
        images: Number of an image with each hash.
        is_partial: Is set for each image for which there are too many of them.
    """
    parts = hashes[:, :2].view(np.uint16)  # [images, bands]
    # Of a part with no more images all pairs are compared, so that no later band compares them again.
    is_small = np.array([np.bincount(part, minlength=2**_BAND) <= _WINDOW + 1 for part in parts.T])
    shifts = np.arange(1, _WINDOW + 2)  # the last one shows that there are more than are compared
    for band in range(_BANDS):
        ordered = np.argsort(parts[:, band], kind="stable")  # within a part in the order of the hashes
        for begin in range(0, len(ordered), _BLOCKS * _BLOCK):
            near = ordered[begin : begin + _BLOCKS * _BLOCK + len(shifts)]
            rows = min(_BLOCKS * _BLOCK, len(near))
            padded = np.concatenate([parts[near, band].astype(np.int32), np.full(len(shifts), -1, np.int32)])
            row, shift = np.nonzero(padded[:rows, None] == sliding_window_view(padded, len(shifts))[1 : rows + 1])
            words = hashes[near, :2]
            differences = words[row] ^ words[row + shifts[shift]]
            distances = np.bitwise_count(differences)
            close = np.flatnonzero(distances[:, 0] + distances[:, 1] <= _MAX_DISTANCE)
            row, shift, differences = row[close], shift[close], differences[close]
            one, other = near[row], near[row + shifts[shift]]
            too_many = shifts[shift] > _WINDOW
            is_partial[images[one[too_many]]] = is_partial[images[other[too_many]]] = True
            equal_parts = differences.view(np.uint16)[:, :band] == 0
            is_new = ~too_many & ~(equal_parts & is_small[np.arange(band), parts[one, :band]]).any(axis=1)
            ends = np.searchsorted(row[is_new], np.arange(_BLOCK, rows, _BLOCK))
            one, other = images[one[is_new]], images[other[is_new]]
            for some in np.split(np.stack([one, other]), ends, axis=1):
                if some.size:
                    yield some[0], some[1]


def _look_the_same(planes: NDArray[np.float32], one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether the two images of each pair look the same.

    Args:
        planes: Images in Y, Cb and Cr, [images, 16, 16, 3].
        one: Place of the first image of each pair.
        other: Place of the second image of each pair.
    """
    planes = planes.copy()
    planes[..., 0] -= planes[..., 0].mean(axis=(1, 2), keepdims=True)
    vectors = planes.reshape(len(planes), -1)
    lengths = np.sqrt((vectors**2).sum(axis=1))
    cosine = (vectors @ vectors.T)[one, other] / (lengths[one] * lengths[other])
    alike = np.abs(np.log(lengths[one] / lengths[other])) <= np.log(_MAX_GAIN)
    found: NDArray[np.bool_] = alike & (cosine >= np.sqrt(_MIN_EXPLAINED))
    open_pairs = np.flatnonzero(alike & ~found & (cosine >= _MIN_SIMILARITY))
    if len(open_pairs):
        images, places = np.unique(np.stack([one[open_pairs], other[open_pairs]]), return_inverse=True)
        explains = _explains(planes[images])
        one, other = places.reshape(2, -1)
        found[open_pairs] = explains[one, other] | explains[other, one]
    return found


def _explains(planes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether an image (column) is another one (row) with another contrast, moved and scaled a little.

    To first order, a small move or scaling adds a multiple of the image's slope, constant or growing along the axis.
    The multiples and the contrast are fitted by least squares.

    Args:
        planes: Images in Y, Cb and Cr without their mean brightness, [images, 16, 16, 3].
    """
    number, size = len(planes), math.prod(planes.shape[1:])
    down, right = np.gradient(planes, axis=(1, 2))
    along = np.linspace(-1, 1, planes.shape[1], dtype=np.float32)
    rows, columns = along[:, None, None], along[None, :, None]
    terms = np.stack([planes, down, right, down * rows, right * columns], axis=1).reshape(number, 5, size)
    targets = planes.reshape(number, size)
    squares = (terms @ terms.transpose(0, 2, 1)).astype(np.float64)
    # An image that is constant along an axis has no slope there, and its products no inverse.
    damping = 1e-6 * np.trace(squares, axis1=1, axis2=2)[:, None, None] * np.eye(5)
    products = (terms.reshape(-1, size) @ targets.T).reshape(number, 5, number).astype(np.float64)
    factors = np.linalg.solve(squares + damping, products)
    explained = (factors * (2 * products - squares @ factors)).sum(axis=1)
    is_copy: NDArray[np.bool_] = explained >= _MIN_EXPLAINED * (targets**2).sum(axis=1)
    return is_copy
