"""What a frozen vision tower sees, computed once and kept.

Where nothing upstream of the merger (or resampler) is trained, the tower says the same of an image in every epoch. So
its output, the merger's input, is computed once before training, by all processes together and in batches of many
images, and lies in one memory-mapped file on each machine; training then neither decodes an image nor runs the
tower. The price is disk: about as much as the slices' plain pixels for 4.6 in bfloat16, four times that for 2.6. The
size is known, and said, before anything is computed.

A store's name is a digest of all that decides its content: the tower's weights, type and code, the rows' images and
the libraries that cut them. So a stale feature cannot be read: another tower looks elsewhere. Where the disk has no
room for a new store, those that nobody has open go, the one not used for longest first.
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
from minicpmv_finetune.minicpmv import batch, modeling, modeling_qwen3_5
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.format import ShardReader

from .callbacks import leave_stopping_to_trainer

PATCHES_AT_ONCE = 2**14
"""Of one pass through the tower: sixteen slices of 448 × 448."""

_PATCHES, _INDEX = "patches.bin", "index.safetensors"
_SPARE_BYTES = 2**30  # of the disk, left to others
_JUST_FOUND = 3600  # seconds after which a store that somebody found is surely open
_BLANK = 4  # patches a side of the image that tells how many vectors come of a slice
_CODE = (batch, modeling, modeling_qwen3_5)
_LIBRARIES = ("pillow", "torch", "torchvision", "transformers")


@dataclass(frozen=True)
class PatchFeatures:
    """Of one row.

    Attributes:
        patches: [patches of all slices, vision width].
        sizes: int32 [slices, 2], (rows, columns) of each slice in patches, before any merging.
    """

    patches: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class StorePlan:
    """A store that is there or is to be made.

    Attributes:
        folder: of its own, named by what decides the content.
        sizes: int32 [slices, 2], of all rows' slices in patches.
        first_slice: int [rows + 1], number of each row's first slice.
        first_patch: int [rows + 1], number of each row's first vector.
        width: of a vector.
        dtype: of its numbers.
    """

    folder: Path
    sizes: torch.Tensor
    first_slice: torch.Tensor
    first_patch: torch.Tensor
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """That it takes on disk."""
        return int(self.first_patch[-1]) * self.width * self.dtype.itemsize

    @property
    def is_there(self) -> bool:
        """Whether it is finished."""
        return (self.folder / _INDEX).is_file()


class FeatureStore:
    """A finished store, which stays while it is open; a copy sent to another process opens the file anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = (folder / _INDEX).open("rb")
        fcntl.flock(self._open, fcntl.LOCK_SH)
        index = load_file(folder / _INDEX)
        with safe_open(folder / _INDEX, framework="pt") as file:
            described = file.metadata()
        self._sizes, self._first_slice, self._first_patch = (
            index[name] for name in ("sizes", "first_slice", "first_patch")
        )
        width, dtype = int(described["width"]), getattr(torch, described["dtype"])
        count = int(self._first_patch[-1])
        stored = torch.from_file(str(folder / _PATCHES), False, count * width, dtype=dtype) if count else torch.empty(0)
        self._patches = stored.to(dtype).view(count, width)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return type(self), (self.folder,)

    def __getitem__(self, row: int) -> PatchFeatures:
        slices = slice(int(self._first_slice[row]), int(self._first_slice[row + 1]))
        patches = slice(int(self._first_patch[row]), int(self._first_patch[row + 1]))
        return PatchFeatures(self._patches[patches], self._sizes[slices])


def is_reusable(model: nn.Module, tower: nn.Module) -> bool:
    """Whether the tower, a part of the model, says the same of an image at every time."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    drops = bool(getattr(vision, "attention_dropout", 0.0))
    return not drops and not any(parameter.requires_grad for parameter in tower.parameters())


def make_stores(
    model: PreTrainedModel,
    generation: Generation,
    shards: Path,
    splits: list[Split],
    cache: Path,
    training: TransformersArguments,
    say: Callable[[str], None],
) -> dict[Split, Path]:
    """Find or compute the features of all rows; every process takes part, and each does a share of its machine's.

    Args:
        model: the base model, whose tower is frozen.
        generation: its description.
        shards: the folder with the rows.
        splits: of them.
        cache: the stores lie in `features/` here.
        training: for the device, the type that is computed in, and the workers that decode.
        say: takes a sentence.

    Returns:
        The stores' folders by split; empty where the disk has no room for them, which is said.
    """
    tower = model.get_submodule(generation.vision_tower)
    with _whole(tower), torch.no_grad(), _precision(training):
        tower.to(training.device)
        was_training = tower.training
        tower.eval()
        key = _digest(model, tower, training)
        plans = {split: _plan(model, training.device, ShardReader(shards, split), cache, key) for split in splits}
        for plan in plans.values():
            if plan.is_there:
                os.utime(plan.folder / _INDEX)  # when it was last used
        missing = {split: plan for split, plan in plans.items() if not plan.is_there}
        wanted = sum(plan.bytes for plan in missing.values())
        cache.mkdir(parents=True, exist_ok=True)
        if wanted and training.local_process_index == 0:
            _make_room(cache / "features", wanted, {plan.folder for plan in plans.values()})
        _meet(training)
        free = shutil.disk_usage(cache).free - _SPARE_BYTES
        where = f"vision features of {sum(len(plan.sizes) for plan in plans.values()):,} slices"
        if not _all_agree(wanted <= free, training):
            say(
                f"{where} would take {wanted / 1e9:.2f} GB, and {cache} has {max(free, 0) / 1e9:.2f} GB to spare: they "
                "are computed anew in each epoch; --cache_dir leads to another disk."
            )
            return {}
        found = "found in" if not missing else f"computed once, {wanted / 1e9:.2f} GB in"
        say(f"{where}: {found} {cache / 'features'}")
        for split, plan in plans.items():
            _make(model, plan, ShardReader(shards, split), training, split not in missing)
        tower.train(was_training)
    return {split: plan.folder for split, plan in plans.items()}


def join(rows: list[PatchFeatures]) -> dict[str, torch.Tensor]:
    """The model's arguments for the features of a batch."""
    return {
        "patch_features": torch.cat([row.patches for row in rows]),
        "target_sizes": torch.cat([row.sizes for row in rows]),
    }


def _plan(model: PreTrainedModel, device: torch.device, reader: ShardReader, cache: Path, key: str) -> StorePlan:
    rows = reader.slice_sizes()
    pixels = torch.zeros(1, 3, reader.manifest.patch_size, reader.manifest.patch_size * _BLANK**2)
    of_blank = _encode(model, device, pixels, torch.full((1, 2), _BLANK, dtype=torch.int32))
    merged = _BLANK**2 // len(of_blank)
    images = {
        "shards": [shard.sha256 for shard in reader.manifest.shards.get(reader.split, [])],
        "codec": reader.manifest.codec,
        "slicing": reader.manifest.slicing,
    }
    name = hashlib.sha256(json.dumps([key, images], sort_keys=True).encode()).hexdigest()[:32]
    sizes = torch.tensor([size for row in rows for size in row], dtype=torch.int32).view(-1, 2)
    first_slice = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    first_patch = torch.cat([torch.zeros(1, dtype=torch.long), (sizes.long().prod(1) // merged).cumsum(0)])[first_slice]
    return StorePlan(cache / "features" / name, sizes, first_slice, first_patch, of_blank.shape[-1], of_blank.dtype)


def _make_room(stores: Path, wanted: int, keep: set[Path]) -> None:
    """Delete stores not used for longest, if so many bytes come free by it; those in use or to keep stay."""
    lacking = wanted - (shutil.disk_usage(stores.parent).free - _SPARE_BYTES)
    deleted: list[Path] = []
    for index in sorted(stores.glob(f"[!.]*/{_INDEX}"), key=lambda index: index.stat().st_mtime):
        if lacking <= 0 or index.parent in keep or time.time() - index.stat().st_mtime < _JUST_FOUND:
            continue
        with index.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        deleted.append(index.parent)
        lacking -= (index.parent / _PATCHES).stat().st_size
    if lacking <= 0:
        for store in deleted:
            shutil.rmtree(store, ignore_errors=True)


def _make(
    model: PreTrainedModel, plan: StorePlan, reader: ShardReader, training: TransformersArguments, is_there: bool
) -> None:
    """Write a store into a folder beside its own, each process its share, and rename it."""
    first = training.local_process_index == 0
    launch = f"{environment.TORCHELASTIC_RUN_ID.read() or os.getpid()}-{environment.GROUP_RANK.read()}"
    staging = plan.folder.with_name(f".{plan.folder.name}.{launch}")
    try:
        if first and not is_there:
            staging.mkdir(parents=True)
            with (staging / _PATCHES).open("wb") as file:
                file.truncate(plan.bytes)
        _meet(training)
        if not is_there and plan.bytes:
            _fill(staging / _PATCHES, model, plan, reader, training)
        _meet(training)
        if first and not is_there:
            save_file(
                {name: getattr(plan, name) for name in ("sizes", "first_slice", "first_patch")},
                staging / _INDEX,
                {"width": str(plan.width), "dtype": str(plan.dtype).removeprefix("torch.")},
            )
            if not plan.is_there:
                staging.rename(plan.folder)
        _meet(training)
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)


def _fill(
    path: Path, model: PreTrainedModel, plan: StorePlan, reader: ShardReader, training: TransformersArguments
) -> None:
    """Compute this process's share of the rows into the file."""
    processes = int(environment.LOCAL_WORLD_SIZE.read() or 1)
    share = np.array_split(np.arange(len(reader)), processes)[training.local_process_index]
    manifest = reader.manifest
    loader = DataLoader(
        _Images(reader),
        batch_sampler=_batches(share.tolist(), plan.first_patch),
        collate_fn=partial(
            batch.collate,
            pad_token_id=manifest.pad_token_id,
            patch_size=manifest.patch_size,
            padding_side="right",
            resampler=manifest.slicing["resampler"],
        ),
        num_workers=training.dataloader_num_workers,
        worker_init_fn=leave_stopping_to_trainer,
    )
    total = int(plan.first_patch[-1]) * plan.width
    file = torch.from_file(str(path), True, total, dtype=plan.dtype).view(-1, plan.width)
    place = int(plan.first_patch[share[0]]) if len(share) else 0
    with progress("vision features", len(plan.sizes), " slices") as bar:
        for images in loader:
            if "pixel_values" not in images:
                continue
            features = _encode(model, training.device, images["pixel_values"], images["target_sizes"])
            file[place : place + len(features)] = features.cpu()
            place += len(features)
            bar.update(len(images["target_sizes"]) * processes)


class _Images(Dataset[ModelInput]):
    """The rows with their images; workers open the files anew."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> ModelInput:
        row: ModelInput = self.reader[position]
        return row


def _batches(rows: list[int], first_patch: torch.Tensor) -> list[list[int]]:
    """Neighbouring rows with at least `PATCHES_AT_ONCE` vectors together."""
    batches: list[list[int]] = [[]]
    patches = 0
    for row in rows:
        batches[-1].append(row)
        patches += int(first_patch[row + 1] - first_patch[row])
        if patches >= PATCHES_AT_ONCE:
            batches.append([])
            patches = 0
    return [numbers for numbers in batches if numbers]


def _encode(model: PreTrainedModel, device: torch.device, pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    encode: Any = model.encode_patches
    features: torch.Tensor = encode(pixels.to(device), sizes.to(device))
    return features


def _digest(model: PreTrainedModel, tower: nn.Module, training: TransformersArguments) -> str:
    """Of all that decides what the tower says of given pixels."""
    digest = hashlib.sha256()
    settings = {
        "model": type(model).__name__,
        "vision": model.config.vision_config.to_dict(),
        "downsample_mode": getattr(model.config, "downsample_mode", None),
        "attention": getattr(getattr(tower, "config", None), "_attn_implementation", None),
        "mixed": [training.bf16, training.fp16],
        "device": training.device.type,
        "code": [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in _CODE],
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in tower.named_parameters():
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """A module with all its weights here, also where ZeRO-3 cuts them into parts."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def _precision(training: TransformersArguments) -> Any:
    """As the Trainer computes, so that the features are those of a training that computes them anew."""
    if not (training.bf16 or training.fp16):
        return nullcontext()
    return torch.autocast(training.device.type, torch.bfloat16 if training.bf16 else torch.float16)


def _all_agree(answer: bool, training: TransformersArguments) -> bool:
    if not torch.distributed.is_initialized():
        return answer
    votes = torch.tensor([float(answer)], device=training.device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes.item())


def _meet(training: TransformersArguments) -> None:
    """Wait for all processes; not by a barrier alone, which some backends do not wait in."""
    _all_agree(True, training)
