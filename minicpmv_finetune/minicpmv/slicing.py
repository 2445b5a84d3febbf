"""How an image is cut into slices: first the plan, from the image's size alone, then the pixels, from the plan.

MiniCPM-V sees an image once as a whole (the overview) and, if the image is larger than the working area of the vision
encoder, a second time as a grid of slices of about that area. The plan needs only width and height, so sequence
lengths, memory and token counts are known before any pixel is decoded. Pixels stay uint8 until the trainer normalizes
them, which is a quarter of the bytes of float32.

The arithmetic follows the published image processors; tests compare the pixels of every generation with theirs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minicpmv_finetune.data.image_files import Transparency, to_rgb

from .resampling import resize_bicubic

ResizingLibrary = Literal["pillow", "torchvision"]
Size = tuple[int, int]


@dataclass(frozen=True)
class SlicingConfig:
    """The settings that decide how an image is sliced.

    Attributes:
        max_slice_nums: Largest number of slices besides the overview.
        scale_resolution: Side in pixels of the working area: a slice has at most about the area of this square.
        patch_size: Side in pixels of a patch of the vision encoder.
        size_multiple: The sides of a slice are multiples of this number of pixels: the patch size times the number of
            patches on each side of a square that is merged into one token.
        slice_mode: Whether large images are sliced; if false, the model sees the overview only.
        resampler: Library whose bicubic filter resizes images. Their results differ by one gray level in some pixels.
        transparency: Whether an alpha channel is dropped or the image is placed on white.
    """

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    size_multiple: int = 14
    slice_mode: bool = True
    resampler: ResizingLibrary = "pillow"
    transparency: Transparency = "drop"

    def with_max_slices(self, max_slice_nums: int | None) -> "SlicingConfig":
        """Return a copy with another largest number of slices; None keeps the checkpoint's number."""
        return self if max_slice_nums is None else replace(self, max_slice_nums=max_slice_nums)


@dataclass(frozen=True)
class SlicePlan:
    """The sizes and the grid by which an image is cut. Sizes are (width, height) in pixels.

    Attributes:
        overview: Size to which the whole image is resized for the overview.
        refined: Size to which the image is resized before it is cut into slices; None if it is not cut.
        grid: (rows, columns) of the slices; None if the image is not cut.
        patch_size: Side of a patch in pixels.
    """

    overview: Size
    refined: Size | None
    grid: tuple[int, int] | None
    patch_size: int

    @property
    def slice_size(self) -> Size | None:
        """Size of each slice of the grid."""
        if self.refined is None or self.grid is None:
            return None
        return self.refined[0] // self.grid[1], self.refined[1] // self.grid[0]

    @property
    def target_sizes(self) -> list[Size]:
        """Size in patches, (rows, columns), of the overview and then of each slice, row by row."""
        patches = [(self.overview[1] // self.patch_size, self.overview[0] // self.patch_size)]
        if self.grid is not None and self.slice_size is not None:
            width, height = self.slice_size
            patches += [(height // self.patch_size, width // self.patch_size)] * (self.grid[0] * self.grid[1])
        return patches


def plan_slices(width: int, height: int, config: SlicingConfig) -> SlicePlan:
    """Decide how an image is sliced, from its size in pixels."""
    grid = _best_grid(width, height, config) if config.slice_mode else None
    overview = _fit_working_area(width, height, config, upscale=grid is None)
    if grid is None:
        return SlicePlan(overview, None, None, config.patch_size)
    rows, columns = grid
    # The size of one slice is decided first, and the image is resized to a whole number of slices in each direction.
    cell = _fit_working_area(
        _round_to_multiple(width, columns) / columns,
        _round_to_multiple(height, rows) / rows,
        config,
        upscale=True,
    )
    return SlicePlan(overview, (cell[0] * columns, cell[1] * rows), grid, config.patch_size)


def cut_slices(image: Image.Image, plan: SlicePlan, config: SlicingConfig) -> list[NDArray[np.uint8]]:
    """Return the pixels of the overview and of the slices.

    Args:
        image: The decoded image, in any mode.
        plan: The result of `plan_slices` for the image's size.
        config: The configuration that `plan_slices` was called with.

    Returns:
        The overview and then each slice, row by row, each uint8 [height, width, 3].
    """
    pixels = np.asarray(to_rgb(image, config.transparency))
    slices = [_resize(pixels, plan.overview, config.resampler)]
    if plan.refined is not None and plan.grid is not None and plan.slice_size is not None:
        whole = _resize(pixels, plan.refined, config.resampler)
        (rows, columns), (width, height) = plan.grid, plan.slice_size
        slices += [
            whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]
    return slices


def _best_grid(width: int, height: int, config: SlicingConfig) -> tuple[int, int] | None:
    """Return the grid (rows, columns) whose aspect ratio is nearest to the image's.

    The number of slices is the image's area divided by the working area, rounded up, or one more or one less. None
    means that the image is not cut.
    """
    ratio = width * height / (config.scale_resolution * config.scale_resolution)
    wanted = min(math.ceil(ratio), config.max_slice_nums)
    if wanted <= 1:
        return None
    log_ratio = math.log(width / height)
    best, least_error = (1, 1), math.inf
    for number in (wanted - 1, wanted, wanted + 1):
        if number == 1 or number > config.max_slice_nums:
            continue
        # Grids with more rows come first: of two equally near grids the published code takes the one with more rows.
        for rows in range(number, 0, -1):
            if number % rows == 0:
                error = abs(log_ratio - math.log(number // rows / rows))
                if error < least_error:
                    best, least_error = (rows, number // rows), error
    return best


def _fit_working_area(width: float, height: float, config: SlicingConfig, upscale: bool) -> Size:
    """Return a size of about the working area with the same aspect ratio, in multiples of `size_multiple`.

    A size below the working area is enlarged only if `upscale` is true.
    """
    if upscale or width * height > config.scale_resolution * config.scale_resolution:
        aspect = width / height
        height = int(config.scale_resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return _round_to_multiple(width, config.size_multiple), _round_to_multiple(height, config.size_multiple)


def _round_to_multiple(length: float, multiple: int) -> int:
    # Python's round takes the even neighbor at .5. The published code uses it too, and equality depends on it.
    return max(round(length / multiple) * multiple, multiple)


def _resize(pixels: NDArray[np.uint8], size: Size, resampler: ResizingLibrary) -> NDArray[np.uint8]:
    if resampler == "pillow":
        return resize_bicubic(pixels, *size)
    import torch
    from torchvision.transforms.v2 import functional  # type: ignore[import-untyped, unused-ignore]

    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    resized = functional.resize(
        planes, [size[1], size[0]], interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    )
    return resized.permute(1, 2, 0).contiguous().numpy()
