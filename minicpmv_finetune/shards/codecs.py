"""Image codecs: the images of a row are stored as slices, raw or losslessly compressed, or as the original file.

Every codec restores exactly the pixels that slicing on the fly gives. The codecs differ in their costs: `raw` is read
at the speed of memory and takes three bytes per pixel; `webp-lossless` and `png` take a third of that and must be
decoded; `source` stores the original file with the plan of its slices, takes the least space for photographs, and is
decoded and scaled when it is read. docs/performance.md has the measurements behind the default.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minicpmv_finetune.data.samples import decode_image
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.slicing import SlicePlan, SlicingConfig, cut_slices

Codec = Literal["source", "raw", "webp-lossless", "png"]
CODECS: tuple[Codec, ...] = get_args(Codec)
DEFAULT_CODEC: Codec = "source"

_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    # The fastest settings: slower ones save a tenth of the bytes and take several times as long.
    "webp-lossless": ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "png": ("PNG", {"compress_level": 1}),
}
# Numbers in the layout for each file of `source`: width and height of the overview, width and height of the refined
# image, rows and columns of the grid, and 1 if the image is rotated as EXIF says.
_NUMBERS_PER_FILE = 7
_NUMBERS_PER_SLICE = 2  # numbers in the layout for each slice of the other codecs: height and width


@dataclass(frozen=True)
class StoredImages:
    """The images of a row as a shard stores them.

    Attributes:
        parts: Encoded slices, or whole files with `source`, in the order of their tokens.
        layout: Numbers that describe each part: `_NUMBERS_PER_FILE` for each file, or `_NUMBERS_PER_SLICE` for each
            slice.
    """

    parts: Sequence[bytes | memoryview]
    layout: Sequence[int]


def check_codec(name: str) -> Codec:
    """The codec with a name.

    Raises:
        UserError: There is no such codec.
    """
    for codec in CODECS:
        if codec == name:
            return codec
    raise UserError(f"image codec {name!r}: unknown; choose one of {', '.join(CODECS)}.")


def store_slices(slices: Sequence[NDArray[np.uint8]], codec: Codec) -> StoredImages:
    """Encode slices with any codec except `source`.

    Args:
        slices: The slices, uint8 [height, width, 3] each.
        codec: The codec.
    """
    layout = [side for pixels in slices for side in pixels.shape[:2]]
    return StoredImages([_encode(pixels, codec) for pixels in slices], layout)


def store_sources(files: Sequence[bytes], plans: Sequence[SlicePlan], rotated: Sequence[bool]) -> StoredImages:
    """Encode images with the codec `source`.

    Args:
        files: The original files.
        plans: The plan of each file's slices.
        rotated: Whether each image is rotated as its EXIF orientation says.
    """
    layout: list[int] = []
    for plan, is_rotated in zip(plans, rotated, strict=True):
        layout += [*plan.overview, *(plan.refined or (0, 0)), *(plan.grid or (0, 0)), int(is_rotated)]
    return StoredImages(files, layout)


def restore_slices(
    parts: Sequence[Any], layout: Sequence[int], codec: Codec, slicing: SlicingConfig
) -> list[NDArray[np.uint8]]:
    """Decode the slices of a row.

    Args:
        parts: The stored parts, each a buffer.
        layout: The stored layout.
        codec: The codec that the parts were stored with.
        slicing: The configuration that made the slice plans.

    Returns:
        The pixels of each slice, uint8 [height, width, 3]; with `raw` they are read-only views of the buffers.
    """
    if codec == "source":
        return [
            pixels
            for content, (*numbers, rotated) in zip(parts, _split(layout, _NUMBERS_PER_FILE), strict=True)
            for pixels in cut_slices(decode_image(content, bool(rotated)), _slice_plan(numbers, slicing), slicing)
        ]
    sizes = _split(layout, _NUMBERS_PER_SLICE)
    return [
        _decode(content, codec).reshape(height, width, 3) for content, (height, width) in zip(parts, sizes, strict=True)
    ]


def stored_sizes(layout: Sequence[int], codec: Codec, slicing: SlicingConfig) -> list[tuple[int, int]]:
    """The (rows, columns) in patches of each slice, from the stored layout without decoding an image."""
    if codec == "source":
        plans = (_slice_plan(numbers, slicing) for *numbers, _ in _split(layout, _NUMBERS_PER_FILE))
        return [size for plan in plans for size in plan.target_sizes]
    patch = slicing.patch_size
    return [(height // patch, width // patch) for height, width in _split(layout, _NUMBERS_PER_SLICE)]


def _split(layout: Sequence[int], count: int) -> list[Sequence[int]]:
    return [layout[start : start + count] for start in range(0, len(layout), count)]


def _slice_plan(numbers: Sequence[int], slicing: SlicingConfig) -> SlicePlan:
    width, height, refined_width, refined_height, rows, columns = numbers
    return SlicePlan(
        overview=(width, height),
        refined=(refined_width, refined_height) if rows else None,
        grid=(rows, columns) if rows else None,
        patch_size=slicing.patch_size,
    )


def _encode(pixels: NDArray[np.uint8], codec: Codec) -> bytes:
    if codec == "raw":
        return pixels.tobytes()
    form, options = _ENCODERS[codec]
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, form, **options)
    return encoded.getvalue()


def _decode(content: Any, codec: Codec) -> NDArray[np.uint8]:
    if codec == "raw":
        return np.frombuffer(content, dtype=np.uint8)
    return np.array(decode_image(content))
