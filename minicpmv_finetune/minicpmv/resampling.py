"""Pillow's bicubic filter, several times as fast and equal to the last bit.

Resizing is most of the cost of preparing an image, and Pillow computes one pixel after the other. Here the inner loop
of each pass runs along a row, so that the compiler (numba) can compute many pixels with one instruction; the horizontal
pass works on strips of rows that are transposed, and small enough for the processor's cache (1.6 times as fast as
transposing the whole image, 1344 × 1344 to 448 × 448). All sums are sums of integers, as in Pillow: the coefficients
are fixed-point numbers with 22 fractional bits, computed in double precision, and the result is rounded to 8 bits after
each pass. The order of the two passes changes some pixels by one gray level; it is the order of Pillow 13.

Another release of Pillow may choose another order, as releases before 13 did. Therefore the first use compares both
implementations on small images; where they differ, or where numba is not installed, Pillow itself resizes.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .compiled import compile_loop

_FRACTION_BITS = 22  # of a coefficient: 32 bits less 8 of a pixel and 2 for sums outside of 0 to 1
_SUPPORT = 2.0  # radius of the cubic kernel in pixels
_A = -0.5  # parameter of the cubic kernel: Catmull-Rom
_STRIP = 64  # rows that are transposed and filtered at a time
_COMPARED_SIZES = ((23, 17), (9, 30), (31, 27), (18, 9), (14, 9))  # (width, height), each from an image of 20 × 20

# For each output pixel the first input pixel [out] and the coefficients [out, taps], with zeros after the last one.
Coefficients = tuple[NDArray[np.int64], NDArray[np.int32]]


def resize_bicubic(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize an image with the result of Pillow's `resize((width, height), BICUBIC)`.

    Args:
        pixels: uint8 [height, width, 3].
        width: New width in pixels.
        height: New height in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    kernels = _kernels_equal_to_pillow()
    if kernels is None:
        return _resize_with_pillow(pixels, width, height)
    return _resize_with_kernels(pixels, width, height, *kernels)


def _resize_with_pillow(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _resize_with_kernels(
    pixels: NDArray[np.uint8], width: int, height: int, filter_rows: Callable[..., None], transpose: Callable[..., None]
) -> NDArray[np.uint8]:
    def resize_horizontally() -> None:
        nonlocal pixels
        rows, columns = pixels.shape[:2]
        if columns == width:
            return
        resized = np.empty((rows, width, 3), np.uint8)
        for top in range(0, rows, _STRIP):
            strip, new = pixels[top : top + _STRIP], resized[top : top + _STRIP]
            transposed = np.empty((columns, strip.size // columns), np.uint8)
            transpose(strip, transposed)
            filtered = np.empty((width, transposed.shape[1]), np.uint8)
            filter_rows(transposed, *_coefficients(columns, width), filtered)
            transpose(filtered.reshape(width, -1, 3), new.reshape(len(new), -1))
        pixels = resized

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
    weights = np.zeros((new, math.ceil((2 * math.ceil(support) + 1) / 4) * 4), np.int32)  # `_filter_rows` takes four
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
    filter_rows, transpose = compile_loop(_filter_rows), compile_loop(_transpose)
    if filter_rows is None or transpose is None:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    noise[:10] = noise[:10] // 128 * 255  # strong edges, whose filtered values are below 0 or above 255
    for width, height in _COMPARED_SIZES:
        resized = _resize_with_kernels(noise, width, height, filter_rows, transpose)
        if not np.array_equal(resized, _resize_with_pillow(noise, width, height)):
            return None
    return filter_rows, transpose


def _filter_rows(
    rows: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int32], filtered: NDArray[np.uint8]
) -> None:
    """Compute each row of `filtered` as a weighted sum of neighboring `rows`."""
    width, last = rows.shape[1], rows.shape[0] - 1
    half = np.int32(1 << (_FRACTION_BITS - 1))
    sums = np.empty(width, np.int32)
    for place in range(filtered.shape[0]):
        sums[:] = half
        for tap in range(0, weights.shape[1], 4):  # four rows at a time: each sum is read and written once for them
            w0, w1, w2, w3 = (
                weights[place, tap],
                weights[place, tap + 1],
                weights[place, tap + 2],
                weights[place, tap + 3],
            )
            if w0 == 0 and w1 == 0 and w2 == 0 and w3 == 0:
                continue
            row = first[place] + tap
            # Behind the last row the coefficients are zeros, so that any row may stand in.
            r0, r1, r2, r3 = rows[row], rows[min(row + 1, last)], rows[min(row + 2, last)], rows[min(row + 3, last)]
            for pixel in range(width):
                sums[pixel] += np.int32(r0[pixel]) * w0 + np.int32(r1[pixel]) * w1
                sums[pixel] += np.int32(r2[pixel]) * w2 + np.int32(r3[pixel]) * w3
        new = filtered[place]
        for pixel in range(width):
            new[pixel] = np.uint8(min(max(sums[pixel] >> _FRACTION_BITS, np.int32(0)), np.int32(255)))


def _transpose(pixels: NDArray[np.uint8], transposed: NDArray[np.uint8]) -> None:
    """Turn columns into rows: from [height, width, 3] to [width, height * 3].

    The inner loop goes along the shorter side, whose lines stay in the fastest cache: half of the time for a strip.
    """
    height, width = pixels.shape[:2]
    is_wide = width > height
    for outer in range(max(width, height)):
        for inner in range(min(width, height)):
            y, x = (inner, outer) if is_wide else (outer, inner)
            transposed[x, 3 * y] = pixels[y, x, 0]
            transposed[x, 3 * y + 1] = pixels[y, x, 1]
            transposed[x, 3 * y + 2] = pixels[y, x, 2]
