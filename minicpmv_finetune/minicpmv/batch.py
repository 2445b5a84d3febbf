"""From tokenized rows to the tensors the model takes; one collator for training, evaluation and prediction.

Pixels come as uint8 slices and leave as the packed layout of the vision tower: the patches of all slices of all
rows, one after the other along the last dimension, so no slice is padded to the longest.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .model_input import IGNORED_LABEL, ModelInput
from .packed import boundaries
from .slicing import Resampler


def collate(
    rows: Sequence[ModelInput],
    pad_token_id: int,
    patch_size: int,
    padding_side: Literal["left", "right"],
    resampler: Resampler = "torchvision",
) -> dict[str, torch.Tensor]:
    """Pad and stack rows.

    Args:
        rows: at least one.
        pad_token_id: fills the padding, which the attention mask hides.
        patch_size: side of a patch in pixels.
        padding_side: right in training, left in generation.
        resampler: of the generation, for `pack_patches`.

    Returns:
        `input_ids` and `attention_mask` [B, T]; `labels` [B, T] when the rows have them; with images also
        `pixel_values` float32 [1, 3, patch_size, patch_size * patches] and `target_sizes` int32 [slices, 2], each a
        slice's (rows, columns) in patches.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for number, row in enumerate(rows):
        place = slice(0, len(row.input_ids)) if padding_side == "right" else slice(length - len(row.input_ids), length)
        input_ids[number, place] = torch.as_tensor(row.input_ids)
        attention_mask[number, place] = 1
        if len(row.labels):
            labels[number, place] = torch.as_tensor(row.labels)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(len(row.labels) for row in rows):
        batch["labels"] = labels
    return {**batch, **_images(rows, patch_size, resampler)}


def collate_packed(rows: Sequence[ModelInput], patch_size: int, resampler: Resampler = "torchvision") -> dict[str, Any]:
    """Put rows behind one another, without padding; see `packed`.

    Args:
        rows: at least one.
        patch_size: side of a patch in pixels.
        resampler: of the generation, for `pack_patches`.

    Returns:
        `input_ids` and `labels` [1, tokens of all rows], where the rows lie, and images as `collate` has them.
    """
    labels = [torch.as_tensor(row.labels).clone() for row in rows]
    for row in labels:
        # What stands before it belongs to another sample.
        row[0] = IGNORED_LABEL
    return {
        "input_ids": torch.cat([torch.as_tensor(row.input_ids) for row in rows]).long().unsqueeze(0),
        "labels": torch.cat(labels).long().unsqueeze(0),
        **boundaries([len(row.input_ids) for row in rows]),
        **_images(rows, patch_size, resampler),
    }


def _images(rows: Sequence[ModelInput], patch_size: int, resampler: Resampler) -> dict[str, torch.Tensor]:
    slices = [pixels for row in rows for pixels in row.slices]
    if not slices:
        return {}
    packed = [pack_patches(pixels, patch_size, resampler) for pixels in slices]
    return {
        "pixel_values": torch.cat(packed, dim=-1).unsqueeze(0),
        "target_sizes": torch.tensor(
            [[pixels.shape[0] // patch_size, pixels.shape[1] // patch_size] for pixels in slices], dtype=torch.int32
        ),
    }


def pack_patches(pixels: NDArray[np.uint8], patch_size: int, resampler: Resampler = "torchvision") -> torch.Tensor:
    """Normalize a slice and lay its patches side by side.

    Args:
        pixels: uint8 [height, width, 3].
        patch_size: side of a patch in pixels, a divisor of both sides.
        resampler: of the generation, whose image processor's arithmetic this follows to the last bit.

    Returns:
        float32 [3, patch_size, patches * patch_size] in [-1, 1], patches row by row.
    """
    height, width, channels = pixels.shape
    patches = torch.tensor(pixels).view(height // patch_size, patch_size, width, channels)
    # A row of the image stays together, so laying out and converting are one pass.
    packed = torch.empty(channels, patch_size, height // patch_size, width).copy_(patches.permute(3, 1, 0, 2))
    packed = packed.view(channels, patch_size, -1)
    if resampler == "pillow":
        # To the unit range first, then mean and deviation 0.5.
        return packed.div_(255).sub_(0.5).div_(0.5)
    # Mean and deviation 0.5 of the unit range, scaled to grey levels.
    return packed.sub_(127.5).div_(127.5)
