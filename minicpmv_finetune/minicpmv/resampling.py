"""Pillow's bicubic filter, several times as fast and equal to the last bit.

Scaling is most of what preparing an image costs, and Pillow adds up one pixel after the other. Here each pass runs
along rows, so that the compiler (numba) can take many pixels at once; the pass across columns works on a transposed
copy. All sums are of integers, as Pillow's are: coefficients in fixed point with 22 bits behind the point, computed in
double precision, and a result rounded to 8 bits after each pass. Which pass comes first changes some pixels by a grey
level, and is Pillow 13's choice.

Another release may choose otherwise, as those before 13 did; so the first use compares the two on small images, and
where they differ, or without numba, Pillow itself scales.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS = 22  # behind the point of a coefficient: 32 less 8 of a pixel and 2 for sums outside of 0 to 1
_SUPPORT = 2.0  # pixels to each side that a cubic reaches
_A = -0.5  # of the cubic: Catmull-Rom
_BLOCK = 32  # rows and columns transposed at once, which stay in the fastest cache
_TRIED = ((23, 17), (9, 30), (31, 27), (18, 9), (14, 9))  # (width, height) that an image of 20 × 20 is scaled to

Pass = tuple[NDArray[np.int64], NDArray[np.int32]]  # first pixel [out], coefficients [out, taps], zero behind the last


def resize_bicubic(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Scale an image as `image.resize((width, height), BICUBIC)` does.

    Args:
        image: of mode RGB.
        width: in pixels.
        height: in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    if image.size == (width, height):
        return np.asarray(image)
    kernels = _kernels_equal_to_pillow()
    if kernels is None:
        return _by_pillow(image, width, height)
    return _scale(np.asarray(image), width, height, *kernels)


def _by_pillow(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _scale(
    pixels: NDArray[np.uint8], width: int, height: int, add_up: Callable[..., None], transpose: Callable[..., None]
) -> NDArray[np.uint8]:
    def across() -> None:
        nonlocal pixels
        rows, columns = pixels.shape[:2]
        if columns == width:
            return
        turned = np.empty((columns, rows * 3), np.uint8)
        transpose(pixels, turned)
        scaled = np.empty((width, rows * 3), np.uint8)
        add_up(turned, *_coefficients(columns, width), scaled)
        pixels = np.empty((rows, width, 3), np.uint8)
        transpose(scaled.reshape(width, rows, 3), pixels.reshape(rows, width * 3))

    def along() -> None:
        nonlocal pixels
        rows, columns = pixels.shape[:2]
        if rows == height:
            return
        scaled = np.empty((height, columns, 3), np.uint8)
        add_up(pixels.reshape(rows, -1), *_coefficients(rows, height), scaled.reshape(height, -1))
        pixels = scaled

    fewer_rows, fewer_columns = pixels.shape[0] - height, pixels.shape[1] - width
    vertical_first = fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    for one_pass in (along, across) if vertical_first else (across, along):
        one_pass()
    return pixels


@lru_cache(maxsize=256)
def _coefficients(old: int, new: int) -> Pass:
    """What each new pixel is made of, in fixed point."""
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
        for value in values:  # one after the other, as rounding depends on it
            total += value
        first[place] = start
        weights[place, : len(values)] = [
            math.trunc(value / total * (1 << _BITS) + math.copysign(0.5, value)) for value in values
        ]
    return first, weights


def _cubic(distance: float) -> float:
    """The bicubic kernel of Keys 1981 with a = -0.5."""
    x = abs(distance)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * _A
    return 0.0


@lru_cache(maxsize=1)
def _kernels_equal_to_pillow() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The compiled passes, or None where they are not to be had or not equal."""
    try:
        import numba
    except ImportError:
        return None

    def compiled(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:  # no folder where compiled code could be kept
            return numba.njit(nogil=True)(function)

    kernels = compiled(_add_up), compiled(_transpose)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    noise[:10] = noise[:10] // 128 * 255  # overshoots
    image = Image.fromarray(noise)
    for width, height in _TRIED:
        if not np.array_equal(_scale(noise, width, height, *kernels), _by_pillow(image, width, height)):
            return None
    return kernels


def _add_up(
    rows: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int32], scaled: NDArray[np.uint8]
) -> None:
    """Make each new row of some of the old ones."""
    width = rows.shape[1]
    half = np.int32(1 << (_BITS - 1))
    sums = np.empty(width, np.int32)
    for place in range(scaled.shape[0]):
        sums[:] = half
        for tap in range(weights.shape[1]):
            weight = weights[place, tap]
            if weight != 0:
                row = rows[first[place] + tap]
                for pixel in range(width):
                    sums[pixel] += np.int32(row[pixel]) * weight
        new = scaled[place]
        for pixel in range(width):
            new[pixel] = np.uint8(min(max(sums[pixel] >> _BITS, np.int32(0)), np.int32(255)))


def _transpose(pixels: NDArray[np.uint8], turned: NDArray[np.uint8]) -> None:
    """Columns become rows: [height, width, 3] to [width, height * 3]."""
    height, width = pixels.shape[0], pixels.shape[1]
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            for x in range(left, min(left + _BLOCK, width)):
                row = turned[x]
                for y in range(top, min(top + _BLOCK, height)):
                    row[3 * y] = pixels[y, x, 0]
                    row[3 * y + 1] = pixels[y, x, 1]
                    row[3 * y + 2] = pixels[y, x, 2]
