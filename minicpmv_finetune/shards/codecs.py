"""How the images of a row are stored: as slices, plain or losslessly compressed, or as the original file.

Every codec gives back the pixels of slicing on the fly, bit for bit. They differ in what they cost: `raw` is read at
the speed of memory and takes three bytes a pixel; `webp-lossless` and `png` take a third of that and must be
decoded; `source` keeps the file as it came with the plan of its slices, takes the least for photographs, and is
decoded and scaled when it is read. docs/performance.md has the figures that picked the default.
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
    # The fastest settings: slower ones take a tenth off the bytes for several times the time.
    "webp-lossless": ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "png": ("PNG", {"compress_level": 1}),
}
_PLAN_NUMBERS = 7  # of a file of `source`: width and height of overview and refined image, rows, columns, is turned
_SIZE_NUMBERS = 2  # of a slice of the other codecs: height, width


@dataclass(frozen=True)
class StoredImages:
    """The images of a row as a shard holds them.

    Attributes:
        parts: encoded slices, or with `source` whole files, in the order in which their tokens stand.
        layout: numbers that tell what each part is; see above.
    """

    parts: Sequence[bytes]
    layout: Sequence[int]


def check_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UserError: there is none.
    """
    for codec in CODECS:
        if codec == name:
            return codec
    raise UserError(f"image codec {name!r}: none of {', '.join(CODECS)}; choose one of them.")


def store_slices(slices: Sequence[NDArray[np.uint8]], codec: Codec) -> StoredImages:
    """Encode slices with any codec but `source`.

    Args:
        slices: uint8 [height, width, 3] each.
        codec: see the module.
    """
    layout = [side for pixels in slices for side in pixels.shape[:2]]
    return StoredImages([_encode(pixels, codec) for pixels in slices], layout)


def store_sources(files: Sequence[bytes], plans: Sequence[SlicePlan], turned: Sequence[bool]) -> StoredImages:
    """Keep whole files, the plans of their slices, and whether they are turned as EXIF says; what `source` does."""
    layout: list[int] = []
    for plan, is_turned in zip(plans, turned, strict=True):
        layout += [*plan.overview, *(plan.refined or (0, 0)), *(plan.grid or (0, 0)), int(is_turned)]
    return StoredImages(files, layout)


def restore_slices(
    parts: Sequence[Any], layout: Sequence[int], codec: Codec, slicing: SlicingConfig
) -> list[NDArray[np.uint8]]:
    """The slices' pixels.

    Args:
        parts: as stored, each a buffer.
        layout: as stored.
        codec: that they were stored with.
        slicing: configuration that made the plans.

    Returns:
        uint8 [height, width, 3] each; with `raw` they are the buffers themselves, not to be written to.
    """
    if codec == "source":
        return [
            pixels
            for content, (*numbers, turned) in zip(parts, _in_turn(layout, _PLAN_NUMBERS), strict=True)
            for pixels in cut_slices(decode_image(content, bool(turned)), _plan(numbers, slicing), slicing)
        ]
    sizes = _in_turn(layout, _SIZE_NUMBERS)
    return [
        _decode(content, codec).reshape(height, width, 3) for content, (height, width) in zip(parts, sizes, strict=True)
    ]


def stored_sizes(layout: Sequence[int], codec: Codec, slicing: SlicingConfig) -> list[tuple[int, int]]:
    """(rows, columns) in patches of each slice, from a stored layout alone."""
    if codec == "source":
        plans = (_plan(numbers, slicing) for *numbers, _ in _in_turn(layout, _PLAN_NUMBERS))
        return [size for plan in plans for size in plan.target_sizes]
    patch = slicing.patch_size
    return [(height // patch, width // patch) for height, width in _in_turn(layout, _SIZE_NUMBERS)]


def _in_turn(layout: Sequence[int], count: int) -> list[Sequence[int]]:
    return [layout[start : start + count] for start in range(0, len(layout), count)]


def _plan(numbers: Sequence[int], slicing: SlicingConfig) -> SlicePlan:
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
