import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minicpmv_finetune.minicpmv import resampling
from minicpmv_finetune.minicpmv.compiled import compile_loop
from minicpmv_finetune.minicpmv.resampling import resize_bicubic


def make_image(width: int, height: int, kind: str) -> Image.Image:
    random = np.random.default_rng([width, height])
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "edges":  # filtered values below 0 or above 255, which are clipped
        pixels = pixels // 128 * 255
    return Image.fromarray(pixels)


SIZES = [
    ((640, 480), (518, 392)),
    ((640, 480), (1036, 378)),
    ((640, 480), (378, 1036)),
    ((300, 500), (448, 448)),
    ((1344, 1344), (448, 448)),
    ((200, 100), (200, 448)),
    ((200, 100), (448, 100)),
    ((1, 1), (14, 28)),
    ((1, 300), (28, 14)),
    ((3000, 7), (1400, 14)),
    ((50, 40), (50, 40)),
]


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_every_pixel_equals_pillows(size: tuple[int, int], target: tuple[int, int], kind: str) -> None:
    image = make_image(*size, kind)
    expected = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_bicubic(np.asarray(image), *target), expected)


def test_every_pixel_equals_pillows_at_random_sizes() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        width, height, new_width, new_height = random.integers(1, 260, 4).tolist()
        image = make_image(width, height, "edges" if width % 2 else "noise")
        expected = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
        resized = resize_bicubic(np.asarray(image), new_width, new_height)
        assert np.array_equal(resized, expected), (width, height, new_width, new_height)


def test_the_compiled_kernels_are_used() -> None:
    assert resampling._kernels_equal_to_pillow() is not None


@pytest.mark.parametrize("reason", ["no numba", "another Pillow"])
def test_pillow_resizes_if_the_kernels_are_missing_or_differ(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(resampling, "_FRACTION_BITS", 15)
        resampling._coefficients.cache_clear()
    compile_loop.cache_clear()
    resampling._kernels_equal_to_pillow.cache_clear()
    try:
        assert resampling._kernels_equal_to_pillow() is None
        image = make_image(60, 50, "noise")
        expected = np.asarray(image.resize((33, 70), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(resize_bicubic(np.asarray(image), 33, 70), expected)
    finally:
        compile_loop.cache_clear()
        resampling._kernels_equal_to_pillow.cache_clear()
        resampling._coefficients.cache_clear()


def test_images_are_resized_without_torch() -> None:
    """validate-data and preprocess would take seconds and hundreds of megabytes more."""
    code = (
        "import sys; import numpy as np; from minicpmv_finetune.minicpmv.resampling import resize_bicubic; "
        "resize_bicubic(np.zeros((30, 40, 3), np.uint8), 20, 20); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
