import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from minicpmv_finetune.data.samples import decode_image
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.slicing import ResizingLibrary, SlicingConfig, cut_slices, plan_slices
from minicpmv_finetune.shards.codecs import (
    CODECS,
    Codec,
    StoredImages,
    check_codec,
    restore_slices,
    store_slices,
    store_sources,
)

ORIENTATION = 0x0112


def image(mode: str, form: str, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 700, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB" if mode in ("CMYK", "P", "L") else mode).convert(mode).save(
        file, form, exif=exif
    )
    return file.getvalue()


FILES = [
    image("RGB", "JPEG"),
    image("CMYK", "JPEG"),
    image("L", "JPEG"),
    image("RGBA", "PNG"),
    image("P", "PNG"),
    image("RGB", "JPEG", orientation=6),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("resampler", ["pillow", "torchvision"])
@pytest.mark.parametrize("rotated", [False, True])
def test_every_codec_restores_the_pixels_of_slicing_on_the_fly(
    codec: Codec, resampler: ResizingLibrary, rotated: bool
) -> None:
    slicing = SlicingConfig(scale_resolution=224, resampler=resampler, transparency="white")
    images = [decode_image(file, rotated) for file in FILES]
    plans = [plan_slices(*image.size, slicing) for image in images]
    slices = [pixels for image, plan in zip(images, plans, strict=True) for pixels in cut_slices(image, plan, slicing)]
    assert len({pixels.shape for pixels in slices}) > 1
    stored = store_sources(FILES, plans, [rotated] * len(FILES)) if codec == "source" else store_slices(slices, codec)
    restored = restore_slices([memoryview(part) for part in stored.parts], stored.layout, codec, slicing)
    assert [pixels.shape for pixels in restored] == [pixels.shape for pixels in slices]
    digests = [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in slices]
    assert [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in restored] == digests


def test_a_row_without_images_has_no_slices() -> None:
    for codec in CODECS:
        assert restore_slices([], StoredImages([], []).layout, codec, SlicingConfig()) == []


def test_an_unknown_codec_is_refused() -> None:
    assert check_codec("raw") == "raw"
    with pytest.raises(UserError, match=r"image codec 'jpeg': unknown; choose one of source, raw, webp-lossless, png"):
        check_codec("jpeg")
