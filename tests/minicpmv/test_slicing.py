import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.minicpmv4_6 import MiniCPMV4_6ImageProcessor

from minicpmv_finetune.minicpmv.batch import pack_patches
from minicpmv_finetune.minicpmv.slicing import ResizingLibrary, SlicePlan, SlicingConfig, cut_slices, plan_slices

sides = st.integers(1, 12_000)
slice_numbers = st.integers(1, 16)
modes = st.sampled_from(["16x", "4x"])


def configured(max_slice_nums: int = 9, downsample_mode: str = "16x", scale_resolution: int = 448) -> SlicingConfig:
    """Return the result of `read_slicing_config` for a 4.6 checkpoint with these settings."""
    return SlicingConfig(
        max_slice_nums=max_slice_nums,
        scale_resolution=scale_resolution,
        size_multiple=14 * (2 if downsample_mode == "4x" else 4),
        resampler="torchvision",
        transparency="white",
    )


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    size = (width, height, len(Image.new(mode, (1, 1)).getbands()))
    content = np.random.default_rng(width * 10_007 + height).bytes(width * height * size[2])
    return Image.frombytes(mode, size[:2], content)


def assert_equal_to_the_processor(image: Image.Image, config: SlicingConfig, downsample_mode: str = "16x") -> None:
    processor = MiniCPMV4_6ImageProcessor(
        max_slice_nums=config.max_slice_nums,
        scale_resolution=config.scale_resolution,
        downsample_mode=downsample_mode,
    )
    theirs = processor(images=[image], return_tensors="pt")
    plan = plan_slices(*image.size, config)
    ours = pack_patches(cut_slices(image, plan, config), config.patch_size)
    assert [list(size) for size in plan.target_sizes] == theirs["target_sizes"].tolist()
    assert list(plan.grid or (0, 0)) == list(theirs["grids"][0])
    assert torch.equal(ours.unsqueeze(0), theirs["pixel_values"])


@given(sides, sides, slice_numbers, modes)
@settings(max_examples=400, deadline=None)
def test_the_plan_equals_the_processors_for_any_size(
    width: int, height: int, max_slice_nums: int, downsample_mode: str
) -> None:
    processor: Any = MiniCPMV4_6ImageProcessor()
    options = {"scale_resolution": 448, "patch_size": 14, "downsample_mode": downsample_mode}
    grid = processor.get_sliced_grid((height, width), max_slice_nums, 448)
    overview = processor.find_best_resize((height, width), allow_upscale=grid is None, **options)
    refined = grid and processor.get_refine_size((height, width), grid, allow_upscale=True, **options)
    expected = SlicePlan(
        overview=(overview[1], overview[0]),
        refined=refined and (refined[1], refined[0]),
        grid=grid and tuple(grid),
        patch_size=14,
    )
    assert plan_slices(width, height, configured(max_slice_nums, downsample_mode)) == expected


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 9), modes)
@settings(max_examples=40, deadline=None)
def test_pixels_equal_the_processors_for_any_size(width: int, height: int, max_slice_nums: int, mode: str) -> None:
    # With a small working area small images are cut into many slices, as large images are with the published area.
    config = configured(max_slice_nums, mode, scale_resolution=224)
    assert_equal_to_the_processor(noise(width, height), config, mode)


@pytest.mark.parametrize(("width", "height"), [(448, 448), (640, 480), (1344, 1344), (1000, 250), (90, 1200)])
def test_pixels_equal_the_processors_at_the_published_settings(width: int, height: int) -> None:
    assert_equal_to_the_processor(noise(width, height), configured())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr"])
def test_pixels_of_every_color_mode_equal_the_processors(mode: str) -> None:
    assert_equal_to_the_processor(noise(150, 90, mode), configured())


def test_pixels_of_black_and_white_images_equal_the_processors() -> None:
    assert_equal_to_the_processor(noise(150, 90, "L").convert("1"), configured())


@pytest.mark.parametrize("transparency", [None, 7], ids=["opaque", "one color transparent"])
def test_pixels_of_palette_images_equal_the_processors(transparency: int | None) -> None:
    file = io.BytesIO()
    options = {} if transparency is None else {"transparency": transparency}
    noise(150, 90).quantize(16).save(file, "PNG", **options)
    image = Image.open(file)
    assert image.mode == "P"
    assert_equal_to_the_processor(image, configured())


def test_a_transparent_image_is_placed_on_white() -> None:
    clear = Image.new("RGBA", (100, 100), (200, 0, 0, 0))
    (pixels,) = cut_slices(clear, plan_slices(100, 100, configured()), configured())
    assert (pixels == 255).all()


def test_colors_are_kept_where_the_processor_drops_the_alpha_channel() -> None:
    clear = Image.new("RGBA", (100, 100), (200, 0, 0, 0))
    (pixels,) = cut_slices(clear, plan_slices(100, 100, SlicingConfig()), SlicingConfig())
    assert (pixels == (200, 0, 0)).all()


@pytest.mark.parametrize(("width", "height", "grid"), [(640, 480, (1, 2)), (300, 1300, (3, 1)), (1000, 900, (2, 2))])
def test_slices_of_2_6_to_4_5_equal_pillows_pixels(width: int, height: int, grid: tuple[int, int]) -> None:
    image, config = noise(width, height), SlicingConfig()
    plan = plan_slices(width, height, config)
    overview, *slices = cut_slices(image, plan, config)
    assert plan.grid == grid
    assert plan.refined is not None
    np.testing.assert_array_equal(overview, np.asarray(image.resize(plan.overview, Image.Resampling.BICUBIC)))
    refined = np.asarray(image.resize(plan.refined, Image.Resampling.BICUBIC))
    rows = [np.concatenate(slices[start : start + grid[1]], axis=1) for start in range(0, len(slices), grid[1])]
    np.testing.assert_array_equal(np.concatenate(rows), refined)


def test_without_slice_mode_an_image_of_any_size_is_an_overview_only() -> None:
    config = SlicingConfig(slice_mode=False)
    plan = plan_slices(4000, 3000, config)
    assert (plan.grid, plan.refined, plan.slice_size) == (None, None, None)
    assert plan.target_sizes == [(28, 37)]
    assert [pixels.shape for pixels in cut_slices(noise(400, 300), plan_slices(400, 300, config), config)] == [
        (392, 518, 3)
    ]


def test_default_settings_are_the_published_ones() -> None:
    published, ours = MiniCPMV4_6ImageProcessor(), SlicingConfig()
    for name in ("max_slice_nums", "scale_resolution", "patch_size", "slice_mode"):
        assert getattr(ours, name) == getattr(published, name)
    assert ours.size_multiple == ours.patch_size


def test_the_number_of_slices_can_be_changed_alone() -> None:
    assert configured(9).with_max_slices(3) == configured(3)
    assert configured(4).with_max_slices(None) == configured(4)


def test_exif_orientation_is_ignored_as_in_the_processor() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees for display
    file = io.BytesIO()
    noise(160, 80).save(file, "JPEG", exif=exif)
    image = Image.open(file)
    assert image.getexif()[0x0112] == 6
    plan = plan_slices(*image.size, configured())
    assert plan.overview[0] > plan.overview[1]
    assert_equal_to_the_processor(image, configured())


@given(st.integers(1, 2500), st.integers(1, 2500), slice_numbers, st.sampled_from(["pillow", "torchvision"]))
@settings(max_examples=40, deadline=None)
def test_slices_tile_the_resized_image(
    width: int, height: int, max_slice_nums: int, resampler: ResizingLibrary
) -> None:
    config = SlicingConfig(max_slice_nums=max_slice_nums, size_multiple=14, resampler=resampler)
    image = noise(width, height)
    plan = plan_slices(width, height, config)
    overview, *slices = cut_slices(image, plan, config)
    assert overview.shape == (plan.overview[1], plan.overview[0], 3)
    if plan.grid is None:
        assert not slices
        return
    rows, columns = plan.grid
    assert 1 < rows * columns == len(slices) <= max_slice_nums
    joined = np.block([[[part] for part in slices[row * columns : (row + 1) * columns]] for row in range(rows)])
    assert plan.refined is not None
    (refined,) = cut_slices(image, SlicePlan(plan.refined, None, None, config.patch_size), config)
    assert np.array_equal(joined, refined)
