"""From tokenized and sliced samples to the tensors of a batch; one collator for training, evaluation and prediction.

Slices come as uint8 pixels and leave in the packed layout of the vision tower: the patches of all slices of all
samples, one after the other along the last dimension. So no slice is padded to the longest one.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .compiled import compile_loop
from .model_input import IGNORED_LABEL, ModelInput
from .packed import packing_arguments
from .slicing import ResizingLibrary

_UNCHANGED = np.arange(256, dtype=np.uint8)
"""The table of `pack_patches` that leaves each pixel as it is."""


def collate(
    inputs: Sequence[ModelInput],
    pad_token_id: int,
    patch_size: int,
    padding_side: Literal["left", "right"],
    resampler: ResizingLibrary = "torchvision",
    normalized: bool = True,
) -> dict[str, torch.Tensor]:
    """Pad samples to the longest one and stack them.

    Args:
        inputs: At least one sample.
        pad_token_id: Token of the padding, which the attention mask hides.
        patch_size: Side of a patch in pixels.
        padding_side: Side of the padding: right in training, left in generation.
        resampler: Library whose arithmetic the generation's image processor uses; see `pack_patches`.
        normalized: Whether the pixels are normalized here; otherwise they stay uint8, a quarter of the bytes, and the
            model normalizes them to the same bits.

    Returns:
        `input_ids` and `attention_mask` [B, T]; `labels` [B, T] if the samples have labels. With images also
        `pixel_values`, float32 or uint8 [1, 3, patch_size, patch_size * patches], and `target_sizes`, int32
        [slices, 2]: the (rows, columns) of each slice in patches.
    """
    length = max(len(sample.input_ids) for sample in inputs)
    input_ids = torch.full((len(inputs), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, sample in enumerate(inputs):
        padding = length - len(sample.input_ids)
        place = slice(0, length - padding) if padding_side == "right" else slice(padding, length)
        input_ids[row, place] = torch.as_tensor(sample.input_ids)
        attention_mask[row, place] = 1
        if len(sample.labels):
            labels[row, place] = torch.as_tensor(sample.labels)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(len(sample.labels) for sample in inputs):
        batch["labels"] = labels
    return {**batch, **_collate_slices(inputs, patch_size, resampler, normalized)}


def collate_packed(
    inputs: Sequence[ModelInput],
    patch_size: int,
    resampler: ResizingLibrary = "torchvision",
    normalized: bool = True,
    shared: Sequence[int] = (),
) -> dict[str, Any]:
    """Concatenate samples into one row without padding; see `packed`.

    Args:
        inputs: At least one sample.
        patch_size: Side of a patch in pixels.
        resampler: Library whose arithmetic the generation's image processor uses; see `pack_patches`.
        normalized: Whether the pixels are normalized here; see `collate`.
        shared: Number of first tokens that each sample shares with the one before it, with all its images; by default
            none.

    Returns:
        `input_ids` and `labels` [1, tokens of all samples], the arguments of `packing_arguments`, and images as from
        `collate`.
    """
    shared = shared or [0] * len(inputs)
    labels = [torch.as_tensor(sample.labels)[count:].clone() for sample, count in zip(inputs, shared, strict=True)]
    for sample_labels in labels:
        # The token before a sample's first one belongs to another sample and must not predict it.
        sample_labels[0] = IGNORED_LABEL
    ids = [torch.as_tensor(sample.input_ids)[count:] for sample, count in zip(inputs, shared, strict=True)]
    with_own_images = [sample for sample, count in zip(inputs, shared, strict=True) if not count]
    return {
        "input_ids": torch.cat(ids).long().unsqueeze(0),
        "labels": torch.cat(labels).long().unsqueeze(0),
        **packing_arguments([len(sample.input_ids) for sample in inputs], shared),
        **_collate_slices(with_own_images, patch_size, resampler, normalized),
    }


def _collate_slices(
    inputs: Sequence[ModelInput], patch_size: int, resampler: ResizingLibrary, normalized: bool
) -> dict[str, torch.Tensor]:
    slices = [pixels for sample in inputs for pixels in sample.slices]
    if not slices:
        return {}
    return {
        "pixel_values": pack_patches(slices, patch_size, resampler, normalized).unsqueeze(0),
        "target_sizes": torch.tensor(
            [[pixels.shape[0] // patch_size, pixels.shape[1] // patch_size] for pixels in slices], dtype=torch.int32
        ),
    }


def pack_patches(
    slices: Sequence[NDArray[np.uint8]],
    patch_size: int,
    resampler: ResizingLibrary = "torchvision",
    normalized: bool = True,
) -> torch.Tensor:
    """Place the patches of slices side by side, and normalize them.

    They are placed in one array, for which numpy asks Linux for large pages, as it does from 4 MB on: 6.5 ms for ten
    slices of 448 × 448, and 11 ms with an array and 600 small pages for each.

    Args:
        slices: At least one, each uint8 [height, width, 3].
        patch_size: Side of a patch in pixels; divides both sides of the slices.
        resampler: Library that the generation's image processor uses. The normalization follows that processor's
            arithmetic to the last bit.
        normalized: Whether to normalize; otherwise the pixels stay uint8.

    Returns:
        float32 in [-1, 1] or uint8, [3, patch_size, patches of all slices * patch_size], row by row in each slice.
    """
    values = _normalized_values(resampler).numpy() if normalized else _UNCHANGED
    widths = [pixels.shape[0] // patch_size * pixels.shape[1] for pixels in slices]
    packed = np.empty((3, patch_size, sum(widths)), values.dtype)
    place = compile_loop(_place_patches, _PLACE_PATCHES)
    start = 0
    for pixels, width in zip(slices, widths, strict=True):
        if place is not None:
            place(pixels, values, packed, start)
        else:
            rows = pixels.reshape(-1, patch_size, pixels.shape[1], 3).transpose(3, 1, 0, 2)
            packed[:, :, start : start + width] = values[rows].reshape(3, patch_size, width)
        start += width
    return torch.from_numpy(packed)


_PLACE_PATCHES = tuple(
    f"void(Array(uint8, 3, 'A', readonly=True), Array({number}, 1, 'C'), Array({number}, 3, 'C'), int64)"
    for number in ("uint8", "float32")
)


def _place_patches(pixels: NDArray[np.uint8], values: NDArray[Any], packed: NDArray[Any], start: int) -> None:
    """Fill `packed`, [3, patch_size, …], from a place on with a slice's pixels, each as the value a table gives it."""
    channels, patch_size, _ = packed.shape
    height, width, _ = pixels.shape
    for row in range(height // patch_size):
        for y in range(patch_size):
            for channel in range(channels):
                for x in range(width):
                    packed[channel, y, start + row * width + x] = values[pixels[row * patch_size + y, x, channel]]


def _normalized_values(resampler: ResizingLibrary) -> torch.Tensor:
    """The normalized value of each of a pixel's 256 values, float32 [256].

    Computed on the CPU: a GPU divides by multiplying with the reciprocal, which changes the last bit.
    """
    return _normalize(torch.arange(256, dtype=torch.float32), resampler)


def _normalize(values: torch.Tensor, resampler: ResizingLibrary) -> torch.Tensor:
    """Normalize float32 values from 0 to 255 in place, by the arithmetic of an image processor."""
    if resampler == "pillow":
        # That processor scales to [0, 1] first and then normalizes with mean 0.5 and standard deviation 0.5.
        return values.div_(255).sub_(0.5).div_(0.5)
    # That processor normalizes in one step: mean 0.5 and standard deviation 0.5, multiplied by 255.
    return values.sub_(127.5).div_(127.5)


def normalize_pixels(pixels: torch.Tensor, resampler: ResizingLibrary, dtype: torch.dtype) -> torch.Tensor:
    """Convert the pixels of a batch to the type of the vision tower, and normalize them if they are uint8.

    Args:
        pixels: Pixels in any shape; of a floating type if they are normalized already.
        resampler: Library whose arithmetic the generation's image processor uses.
        dtype: Type of the result.
    """
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    if pixels.device.type == "cpu":  # less than half the time of the table
        return _normalize(pixels.float(), resampler).to(dtype)
    table = _normalized_values(resampler).to(pixels.device, dtype, non_blocking=True)
    return table.index_select(0, pixels.flatten().int()).view(pixels.shape)
