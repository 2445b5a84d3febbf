"""The outputs of a frozen vision tower, computed once and stored.

If nothing before the merger (or resampler) is trained, the tower's output for an image is the same in every epoch.
Therefore this output, which is the merger's input, is computed once before training, by all processes together and in
batches of many images, and is stored in one memory-mapped file on each machine. Training then neither decodes an image
nor runs the tower. The price is disk space: about as much as the slices' uncompressed pixels for 4.6 in bfloat16, four
times as much for 2.6. The size is known, and reported, before anything is computed.

The name of a store is a digest of everything that determines its content: the tower's weights, type and version of its
code (`FEATURES_VERSION`), the rows' images, and the libraries that slice them. So outdated features cannot be read:
another tower has another name. If the disk has no room for a new store, stores that no process has open are deleted,
the one that was not used for the longest time first.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers import TrainingArguments as TransformersArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from minicpmv_finetune import environment
from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.format import ShardReader

from .loading import SECONDS_FOR_A_BATCH, Explained, HandOver, start_worker, unless_error

FEATURES_VERSION = 2
"""Raise it when a change of `minicpmv/` changes the features; `test_features_match_the_golden_values` detects that."""

MIN_BATCH_PATCHES = 2**14
"""Patches of one pass through the tower, at least: 16 slices of 448 × 448."""

_PATCHES_FILE, _INDEX_FILE = "patches.bin", "index.safetensors"
_SPARE_BYTES = 2**30  # of the disk, which a store leaves free
_RECENT_USE = 3600  # seconds; the process that has just found a store has opened it after this time
_BLANK_SIDE = 4  # patches on each side of the blank image that shows how many vectors a slice has
_LIBRARIES = ("pillow", "torch", "torchvision", "transformers")


@dataclass(frozen=True)
class PatchFeatures:
    """The features of one row.

    Attributes:
        patches: Outputs of the vision tower, [patches of all slices, vision width].
        sizes: int32 [slices, 2], (rows, columns) of each slice in patches, before any merging.
    """

    patches: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class StoreLayout:
    """Where each row's features are in a store, which may not exist yet.

    Attributes:
        folder: Folder of the store, named by the digest of its content.
        sizes: int32 [slices, 2], (rows, columns) in patches of all slices of all rows.
        first_slice: int [rows + 1], number of each row's first slice.
        first_patch: int [rows + 1], number of each row's first vector.
        width: Width of a vector.
        dtype: Type of the numbers.
    """

    folder: Path
    sizes: torch.Tensor
    first_slice: torch.Tensor
    first_patch: torch.Tensor
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the features on disk."""
        return int(self.first_patch[-1]) * self.width * self.dtype.itemsize

    @property
    def is_finished(self) -> bool:
        """Whether the store exists completely."""
        return (self.folder / _INDEX_FILE).is_file()


class FeatureStore:
    """A finished store. It is not deleted while it is open; a copy sent to another process opens the file again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = (folder / _INDEX_FILE).open("rb")
        fcntl.flock(self._open, fcntl.LOCK_SH)
        index = load_file(folder / _INDEX_FILE)
        with safe_open(folder / _INDEX_FILE, framework="pt") as file:
            metadata = file.metadata()
        self._sizes, self._first_slice, self._first_patch = (
            index[name] for name in ("sizes", "first_slice", "first_patch")
        )
        width, dtype = int(metadata["width"]), getattr(torch, metadata["dtype"])
        count = int(self._first_patch[-1])
        path = str(folder / _PATCHES_FILE)
        stored = torch.from_file(path, False, count * width, dtype=dtype) if count else torch.empty(0)
        self._patches = stored.to(dtype).view(count, width)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return type(self), (self.folder,)

    def __getitem__(self, row: int) -> PatchFeatures:
        slices = slice(int(self._first_slice[row]), int(self._first_slice[row + 1]))
        patches = slice(int(self._first_patch[row]), int(self._first_patch[row + 1]))
        return PatchFeatures(self._patches[patches], self._sizes[slices])


def is_reusable(model: nn.Module, tower: nn.Module) -> bool:
    """Whether a model's vision tower gives the same output for an image each time."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    has_dropout = bool(getattr(vision, "attention_dropout", 0.0))
    return not has_dropout and not any(parameter.requires_grad for parameter in tower.parameters())


def prepare_stores(
    model: PreTrainedModel,
    generation: Generation,
    shards: Path,
    splits: list[Split],
    cache: Path,
    training: TransformersArguments,
    report: Callable[[str], None],
) -> dict[Split, Path]:
    """Find or compute the features of all rows; each process computes a share of its machine's rows.

    Every process must call this function.

    Args:
        model: The base model, whose tower is frozen.
        generation: The model's generation.
        shards: Folder of the shards with the rows.
        splits: Splits whose features are needed.
        cache: Folder whose subfolder `features/` contains the stores.
        training: Determines the device, the type of the computation, and the number of workers that decode images.
        report: Receives a sentence about what is done.

    Returns:
        The folder of each split's store; nothing if the disk has no room for them, which is reported.
    """
    tower = model.get_submodule(generation.vision_tower)
    with _gathered(tower), torch.no_grad(), _autocast(training):
        tower.to(training.device)
        was_training = tower.training
        tower.eval()
        key = _tower_digest(model, tower, training)
        readers = {split: ShardReader(shards, split) for split in splits}
        layouts = {split: _layout(model, training.device, readers[split], cache, key) for split in splits}
        missing = {split for split, layout in layouts.items() if not layout.is_finished}
        for split in layouts.keys() - missing:
            os.utime(layouts[split].folder / _INDEX_FILE)  # the time of the last use
        if not _reserve_space(layouts, missing, cache, training, report):
            return {}
        for split, layout in layouts.items():
            _write_store(model, layout, readers[split], training, split not in missing)
        tower.train(was_training)
    return {split: layout.folder for split, layout in layouts.items()}


def feature_arguments(rows: list[PatchFeatures]) -> dict[str, torch.Tensor]:
    """The model's arguments for the features of a batch."""
    return {
        "patch_features": torch.cat([row.patches for row in rows]),
        "target_sizes": torch.cat([row.sizes for row in rows]),
    }


def compute_features(
    model: PreTrainedModel, device: torch.device, pixels: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Compute the tower's outputs for slices.

    Args:
        model: The base model.
        device: Device of the model.
        pixels: `pixel_values` of `batch.collate`.
        sizes: `target_sizes` of `batch.collate`.

    Returns:
        [vectors of all slices, vision width].
    """
    encode: Any = model.encode_patches
    features: torch.Tensor = encode(pixels.to(device), sizes.to(device))
    return features


def _layout(model: PreTrainedModel, device: torch.device, reader: ShardReader, cache: Path, key: str) -> StoreLayout:
    rows = reader.slice_sizes()
    patch_size = reader.manifest.patch_size
    pixels = torch.zeros(1, 3, patch_size, patch_size * _BLANK_SIDE**2)
    blank_features = compute_features(model, device, pixels, torch.full((1, 2), _BLANK_SIDE, dtype=torch.int32))
    patches_per_vector = _BLANK_SIDE**2 // len(blank_features)
    images = {
        "shards": [shard.sha256 for shard in reader.manifest.shards.get(reader.split, [])],
        "codec": reader.manifest.codec,
        "slicing": reader.manifest.slicing,
    }
    name = hashlib.sha256(json.dumps([key, images], sort_keys=True).encode()).hexdigest()[:32]
    sizes = torch.tensor([size for row in rows for size in row], dtype=torch.int32).view(-1, 2)
    first_slice = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    vectors = sizes.long().prod(1) // patches_per_vector
    first_patch = torch.cat([torch.zeros(1, dtype=torch.long), vectors.cumsum(0)])[first_slice]
    folder = cache / "features" / name
    return StoreLayout(folder, sizes, first_slice, first_patch, blank_features.shape[-1], blank_features.dtype)


def _reserve_space(
    layouts: dict[Split, StoreLayout],
    missing: set[Split],
    cache: Path,
    training: TransformersArguments,
    report: Callable[[str], None],
) -> bool:
    """Make room for the missing stores; False if the disk of any machine is too small for them."""
    needed = sum(layouts[split].bytes for split in missing)
    cache.mkdir(parents=True, exist_ok=True)
    if needed and training.local_process_index == 0:
        _delete_unused_stores(cache / "features", needed, {layout.folder for layout in layouts.values()})
    _wait_for_all(training)
    free = shutil.disk_usage(cache).free - _SPARE_BYTES
    subject = f"vision features of {sum(len(layout.sizes) for layout in layouts.values()):,} slices"
    if not _all_agree(needed <= free, training):
        report(
            f"{subject} need {needed / 1e9:.2f} GB, but {cache} has room for {max(free, 0) / 1e9:.2f} GB, so they are "
            "computed again in each epoch; give --cache_dir a folder on a larger disk to store them."
        )
        return False
    stores = cache / "features"
    where = f"computed once and stored in {stores} ({needed / 1e9:.2f} GB)" if missing else f"found in {stores}"
    report(f"{subject} are {where}")
    return True


def _delete_unused_stores(stores: Path, needed: int, keep: set[Path]) -> None:
    """Delete the stores that were not used for the longest time, if that makes enough room; open ones stay."""
    lacking = needed - (shutil.disk_usage(stores.parent).free - _SPARE_BYTES)
    deleted: list[Path] = []
    for index in sorted(stores.glob(f"[!.]*/{_INDEX_FILE}"), key=lambda index: index.stat().st_mtime):
        if lacking <= 0 or index.parent in keep or time.time() - index.stat().st_mtime < _RECENT_USE:
            continue
        with index.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        deleted.append(index.parent)
        lacking -= (index.parent / _PATCHES_FILE).stat().st_size
    if lacking <= 0:
        for store in deleted:
            shutil.rmtree(store, ignore_errors=True)


def _write_store(
    model: PreTrainedModel,
    layout: StoreLayout,
    reader: ShardReader,
    training: TransformersArguments,
    is_finished: bool,
) -> None:
    """Write a store into a temporary folder beside its own, each process its share, and rename the folder."""
    is_first = training.local_process_index == 0
    launch = f"{environment.TORCHELASTIC_RUN_ID.read() or os.getpid()}-{environment.GROUP_RANK.read()}"
    staging = layout.folder.with_name(f".{layout.folder.name}.{launch}")
    try:
        if is_first and not is_finished:
            staging.mkdir(parents=True)
            with (staging / _PATCHES_FILE).open("wb") as file:
                file.truncate(layout.bytes)
        _wait_for_all(training)
        if not is_finished and layout.bytes:
            _write_features(staging / _PATCHES_FILE, model, layout, reader, training)
        _wait_for_all(training)
        if is_first and not is_finished:
            save_file(
                {name: getattr(layout, name) for name in ("sizes", "first_slice", "first_patch")},
                staging / _INDEX_FILE,
                {"width": str(layout.width), "dtype": str(layout.dtype).removeprefix("torch.")},
            )
            if not layout.is_finished:
                staging.rename(layout.folder)
        _wait_for_all(training)
    finally:
        if is_first:
            shutil.rmtree(staging, ignore_errors=True)


def _write_features(
    path: Path, model: PreTrainedModel, layout: StoreLayout, reader: ShardReader, training: TransformersArguments
) -> None:
    """Compute the features of this process's share of the rows, and write them into the file."""
    processes = int(environment.LOCAL_WORLD_SIZE.read() or 1)
    share = np.array_split(np.arange(len(reader)), processes)[training.local_process_index]
    manifest = reader.manifest
    loader = DataLoader(
        Explained(_RowDataset(reader)),
        batch_sampler=_batches(share.tolist(), layout.first_patch),
        collate_fn=HandOver(
            partial(
                collate,
                pad_token_id=manifest.pad_token_id,
                patch_size=manifest.patch_size,
                padding_side="right",
                resampler=manifest.slicing["resampler"],
                normalized=False,
            )
        ),
        num_workers=training.dataloader_num_workers,
        worker_init_fn=start_worker,
        timeout=SECONDS_FOR_A_BATCH if training.dataloader_num_workers else 0,
    )
    total = int(layout.first_patch[-1]) * layout.width
    file = torch.from_file(str(path), True, total, dtype=layout.dtype).view(-1, layout.width)
    position = int(layout.first_patch[share[0]]) if len(share) else 0
    with progress("vision features", len(layout.sizes), " slices") as bar:
        for images in map(unless_error, loader):
            if "pixel_values" not in images:
                continue
            features = compute_features(model, training.device, images["pixel_values"], images["target_sizes"])
            file[position : position + len(features)] = features.cpu()
            position += len(features)
            bar.update(len(images["target_sizes"]) * processes)


class _RowDataset(Dataset[ModelInput]):
    """The rows with their images; a loader's workers open the files again."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> ModelInput:
        row: ModelInput = self.reader[position]
        return row


def _batches(rows: list[int], first_patch: torch.Tensor) -> list[list[int]]:
    """Divide rows into batches of neighbors with at least `MIN_BATCH_PATCHES` vectors each, except the last one."""
    batches: list[list[int]] = [[]]
    patches = 0
    for row in rows:
        batches[-1].append(row)
        patches += int(first_patch[row + 1] - first_patch[row])
        if patches >= MIN_BATCH_PATCHES:
            batches.append([])
            patches = 0
    return [numbers for numbers in batches if numbers]


def _tower_digest(model: PreTrainedModel, tower: nn.Module, training: TransformersArguments) -> str:
    """Digest of everything that determines the tower's output for given pixels."""
    digest = hashlib.sha256()
    settings = {
        "model": type(model).__name__,
        "vision": model.config.vision_config.to_dict(),
        "downsample_mode": getattr(model.config, "downsample_mode", None),
        "attention": getattr(getattr(tower, "config", None), "_attn_implementation", None),
        "mixed": [training.bf16, training.fp16],
        "device": training.device.type,
        "features": FEATURES_VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in tower.named_parameters():
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Gather all weights of a module on this device if ZeRO-3 partitions them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def _autocast(training: TransformersArguments) -> Any:
    """The Trainer's mixed precision, so that stored features equal those that a training would compute."""
    if not (training.bf16 or training.fp16):
        return nullcontext()
    return torch.autocast(training.device.type, torch.bfloat16 if training.bf16 else torch.float16)


def _all_agree(answer: bool, training: TransformersArguments) -> bool:
    """Whether the answer is true in all processes."""
    if not torch.distributed.is_initialized():
        return answer
    votes = torch.tensor([float(answer)], device=training.device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes.item())


def _wait_for_all(training: TransformersArguments) -> None:
    """Wait for all processes. A barrier alone is not enough, because some backends do not block in it."""
    _all_agree(True, training)
