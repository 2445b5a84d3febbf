"""How an image becomes slices: the plan from its size alone, and the pixels from the plan.

MiniCPM-V looks at an image once as a whole (the overview) and, when it is larger than the vision encoder's working
area, again in a grid of slices of about that area. The plan needs only width and height, so lengths, memory and
token counts are known without decoding a pixel; the pixels are kept as uint8 and normalized by the trainer, a
quarter of the bytes of float32.

The arithmetic follows the published image processors; every generation's pixels are tested equal to theirs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minicpmv_finetune.data.image_files import Transparency, to_rgb

from .resampling import resize_bicubic

Resampler = Literal["pillow", "torchvision"]
Size = tuple[int, int]


@dataclass(frozen=True)
class SlicingConfig:
    """What decides the slices of an image.

    Attributes:
        max_slice_nums: most slices beside the overview.
        scale_resolution: side in pixels of the square whose area a slice has at most, about.
        patch_size: side in pixels of a patch of the vision encoder.
        size_multiple: sides of a slice are multiples of this; the patch size times what is merged later.
        slice_mode: False shows every image as an overview only.
        resampler: whose bicubic filter resizes (they differ by a grey level here and there).
        transparency: whether an alpha channel is dropped or laid over white.
    """

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    size_multiple: int = 14
    slice_mode: bool = True
    resampler: Resampler = "pillow"
    transparency: Transparency = "drop"

    def with_max_slices(self, max_slice_nums: int | None) -> "SlicingConfig":
        """The same with another number of slices; None keeps the checkpoint's."""
        return self if max_slice_nums is None else replace(self, max_slice_nums=max_slice_nums)


@dataclass(frozen=True)
class SlicePlan:
    """Where an image's slices come from. Sizes are (width, height) in pixels.

    Attributes:
        overview: size of the whole image as the model first sees it.
        refined: size the image is scaled to before it is cut, or None when it is not cut.
        grid: (rows, columns) of the cut, or None.
        patch_size: side of a patch in pixels.
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
        """(rows, columns) in patches of the overview and then of each slice, row by row."""
        patches = [(self.overview[1] // self.patch_size, self.overview[0] // self.patch_size)]
        if self.grid is not None and self.slice_size is not None:
            width, height = self.slice_size
            patches += [(height // self.patch_size, width // self.patch_size)] * (self.grid[0] * self.grid[1])
        return patches


def plan_slices(width: int, height: int, config: SlicingConfig) -> SlicePlan:
    """Decide an image's slices from its size in pixels."""
    grid = _best_grid(width, height, config) if config.slice_mode else None
    overview = _fit(width, height, config, upscale=grid is None)
    if grid is None:
        return SlicePlan(overview, None, None, config.patch_size)
    rows, columns = grid
    # Each cell is fitted on its own, then the whole is scaled to the cells' sum, so that no slice is cut off.
    cell = _fit(
        _round_to(width, columns) / columns,
        _round_to(height, rows) / rows,
        config,
        upscale=True,
    )
    return SlicePlan(overview, (cell[0] * columns, cell[1] * rows), grid, config.patch_size)


def cut_slices(image: Image.Image, plan: SlicePlan, config: SlicingConfig) -> list[NDArray[np.uint8]]:
    """The slices' pixels.

    Args:
        image: the decoded image, in any mode.
        plan: the result of `plan_slices` for its size.
        config: the same configuration that made the plan.

    Returns:
        The overview and then each slice, row by row, each uint8 [height, width, 3].
    """
    rgb = to_rgb(image, config.transparency)
    slices = [_resize(rgb, plan.overview, config.resampler)]
    if plan.refined is not None and plan.grid is not None and plan.slice_size is not None:
        whole = _resize(rgb, plan.refined, config.resampler)
        (rows, columns), (width, height) = plan.grid, plan.slice_size
        slices += [
            whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]
    return slices


def _best_grid(width: int, height: int, config: SlicingConfig) -> tuple[int, int] | None:
    """The (rows, columns) whose shape is nearest the image's, for as many slices as its area asks for."""
    ratio = width * height / (config.scale_resolution * config.scale_resolution)
    wanted = min(math.ceil(ratio), config.max_slice_nums)
    if wanted <= 1:
        return None
    log_ratio = math.log(width / height)
    best, least_error = (1, 1), math.inf
    for number in (wanted - 1, wanted, wanted + 1):
        if number == 1 or number > config.max_slice_nums:
            continue
        # From many rows to few: of two shapes equally near, the published code takes the one with more rows.
        for rows in range(number, 0, -1):
            if number % rows == 0:
                error = abs(log_ratio - math.log(number // rows / rows))
                if error < least_error:
                    best, least_error = (rows, number // rows), error
    return best


def _fit(width: float, height: float, config: SlicingConfig, upscale: bool) -> Size:
    """The size near the working area that keeps the shape and is a multiple of `size_multiple`."""
    if upscale or width * height > config.scale_resolution * config.scale_resolution:
        aspect = width / height
        height = int(config.scale_resolution / math.sqrt(aspect))
        width = int(height * aspect)
    return _round_to(width, config.size_multiple), _round_to(height, config.size_multiple)


def _round_to(length: float, multiple: int) -> int:
    # Python's round goes to the even neighbour at .5; the published code rounds so, and equality hangs on it.
    return max(round(length / multiple) * multiple, multiple)


def _resize(image: Image.Image, size: Size, resampler: Resampler) -> NDArray[np.uint8]:
    if resampler == "pillow":
        return resize_bicubic(image, *size)
    import torch
    from torchvision.transforms.v2 import functional  # type: ignore[import-untyped, unused-ignore]

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    resized = functional.resize(
        pixels, [size[1], size[0]], interpolation=functional.InterpolationMode.BICUBIC, antialias=True
    )
    return resized.permute(1, 2, 0).contiguous().numpy()
