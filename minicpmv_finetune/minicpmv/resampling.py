"""Pillow's bicubic filter, several times as fast and equal to the last bit.

Resizing is most of the cost of preparing an image, and Pillow computes one pixel after the other. Here the inner loop
of each pass runs along a row, so that the compiler (numba) can compute many pixels with one instruction; the horizontal
pass works on a transposed copy. All sums are sums of integers, as in Pillow: the coefficients are fixed-point numbers
with 22 fractional bits, computed in double precision, and the result is rounded to 8 bits after each pass. The order of
the two passes changes some pixels by one gray level; it is the order of Pillow 13.

Another release of Pillow may choose another order, as releases before 13 did. Therefore the first use compares both
implementations on small images; where they differ, or where numba is not installed, Pillow itself resizes.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRACTION_BITS = 22  # of a coefficient: 32 bits less 8 of a pixel and 2 for sums outside of 0 to 1
_SUPPORT = 2.0  # radius of the cubic kernel in pixels
_A = -0.5  # parameter of the cubic kernel: Catmull-Rom
_BLOCK = 32  # rows and columns that are transposed at a time, so that they stay in the fastest cache
_COMPARED_SIZES = ((23, 17), (9, 30), (31, 27), (18, 9), (14, 9))  # (width, height), each from an image of 20 × 20

# For each output pixel the first input pixel [out] and the coefficients [out, taps], with zeros after the last one.
Coefficients = tuple[NDArray[np.int64], NDArray[np.int32]]


def resize_bicubic(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Resize an image with the result of `image.resize((width, height), BICUBIC)`.

    Args:
        image: Image of mode RGB.
        width: New width in pixels.
        height: New height in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    if image.size == (width, height):
        return np.asarray(image)
    kernels = _kernels_equal_to_pillow()
    if kernels is None:
        return _resize_with_pillow(image, width, height)
    return _resize_with_kernels(np.asarray(image), width, height, *kernels)


def _resize_with_pillow(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _resize_with_kernels(
    pixels: NDArray[np.uint8], width: int, height: int, filter_rows: Callable[..., None], transpose: Callable[..., None]
) -> NDArray[np.uint8]:
    def resize_horizontally() -> None:
        nonlocal pixels
        rows, columns = pixels.shape[:2]
        if columns == width:
            return
        transposed = np.empty((columns, rows * 3), np.uint8)
        transpose(pixels, transposed)
        filtered = np.empty((width, rows * 3), np.uint8)
        filter_rows(transposed, *_coefficients(columns, width), filtered)
        pixels = np.empty((rows, width, 3), np.uint8)
        transpose(filtered.reshape(width, rows, 3), pixels.reshape(rows, width * 3))

    def resize_vertically() -> None:
        nonlocal pixels
        rows, columns = pixels.shape[:2]
        if rows == height:
            return
        filtered = np.empty((height, columns, 3), np.uint8)
        filter_rows(pixels.reshape(rows, -1), *_coefficients(rows, height), filtered.reshape(height, -1))
        pixels = filtered

    fewer_rows, fewer_columns = pixels.shape[0] - height, pixels.shape[1] - width
    vertical_first = fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    passes = (resize_vertically, resize_horizontally) if vertical_first else (resize_horizontally, resize_vertically)
    for resize in passes:
        resize()
    return pixels


@lru_cache(maxsize=256)
def _coefficients(old: int, new: int) -> Coefficients:
    """Compute the fixed-point coefficients that resize a line of `old` pixels to `new` pixels."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    first = np.zeros(new, np.int64)
    weights = np.zeros((new, 2 * math.ceil(support) + 1), np.int32)
    for place in range(new):
        center = (place + 0.5) * scale
        start, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old)
        values = [_cubic((pixel - center + 0.5) * (1.0 / stretch)) for pixel in range(start, end)]
        total = 0.0
        for value in values:  # added in Pillow's order, because the rounding depends on the order
            total += value
        first[place] = start
        weights[place, : len(values)] = [
            math.trunc(value / total * (1 << _FRACTION_BITS) + math.copysign(0.5, value)) for value in values
        ]
    return first, weights


def _cubic(distance: float) -> float:
    """Compute the bicubic kernel of Keys 1981 with a = -0.5."""
    x = abs(distance)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * _A
    return 0.0


@lru_cache(maxsize=1)
def _kernels_equal_to_pillow() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """Return the compiled `filter_rows` and `transpose`; None without numba or where the result is not Pillow's."""
    try:
        import numba
    except ImportError:
        return None

    def compiled(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:  # there is no writable folder for compiled code
            return numba.njit(nogil=True)(function)

    kernels = compiled(_filter_rows), compiled(_transpose)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    noise[:10] = noise[:10] // 128 * 255  # strong edges, whose filtered values are below 0 or above 255
    image = Image.fromarray(noise)
    for width, height in _COMPARED_SIZES:
        resized = _resize_with_kernels(noise, width, height, *kernels)
        if not np.array_equal(resized, _resize_with_pillow(image, width, height)):
            return None
    return kernels


def _filter_rows(
    rows: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int32], filtered: NDArray[np.uint8]
) -> None:
    """Compute each row of `filtered` as a weighted sum of neighboring `rows`."""
    width = rows.shape[1]
    half = np.int32(1 << (_FRACTION_BITS - 1))
    sums = np.empty(width, np.int32)
    for place in range(filtered.shape[0]):
        sums[:] = half
        for tap in range(weights.shape[1]):
            weight = weights[place, tap]
            if weight != 0:
                row = rows[first[place] + tap]
                for pixel in range(width):
                    sums[pixel] += np.int32(row[pixel]) * weight
        new = filtered[place]
        for pixel in range(width):
            new[pixel] = np.uint8(min(max(sums[pixel] >> _FRACTION_BITS, np.int32(0)), np.int32(255)))


def _transpose(pixels: NDArray[np.uint8], transposed: NDArray[np.uint8]) -> None:
    """Turn columns into rows: from [height, width, 3] to [width, height * 3]."""
    height, width = pixels.shape[0], pixels.shape[1]
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            for x in range(left, min(left + _BLOCK, width)):
                row = transposed[x]
                for y in range(top, min(top + _BLOCK, height)):
                    row[3 * y] = pixels[y, x, 0]
                    row[3 * y + 1] = pixels[y, x, 1]
                    row[3 * y + 2] = pixels[y, x, 2]
