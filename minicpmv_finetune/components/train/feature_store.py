"""The outputs of frozen vision modules, computed once and stored.

If nothing before the merger (or resampler) is trained, the tower's output for an image is the same in every epoch; if
the merger is frozen too, so is its output, which is a fifth to a tenth as large. Therefore the last output that does
not change is computed once before training, by all processes together and in batches of many images, and is stored in
one memory-mapped file on each machine, in the type that the training computes in. Training then neither decodes an
image nor runs these modules. The price is disk space: for the tower's output in bfloat16 about as much as the slices'
uncompressed pixels for 4.6, and four times as much for 2.6. The size is known, and reported, before anything is
computed. Where a timed batch shows that computing is faster than reading, nothing is stored.

The name of a store is a digest of everything that determines its content: the modules' weights, type and version of
their code (`FEATURES_VERSION`), the rows' images, and the libraries that slice them. So outdated features cannot be
read: another tower has another name. If there is no room for a new store, stores that no process has open are deleted,
the one that was not used for the longest time first.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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

from .feature_room import INDEX_FILE, PATCHES_FILE, delete_unused_stores, find_room
from .feature_timing import Timing, seconds, time_disk, time_reading
from .loading import SECONDS_FOR_A_BATCH, Explained, HandOver, start_worker, unless_error

FEATURES_VERSION = 2
"""Raise it when a change of `minicpmv/` changes the features; `test_features_match_the_golden_values` detects that."""

MIN_BATCH_PATCHES = 2**14
"""Patches of one pass through the tower, at least, unless no more are left: 16 slices of 448 × 448."""

_BLANK_SIDE = 4  # patches on each side of the blank image that shows how many vectors a slice has
_LIBRARIES = ("pillow", "torch", "torchvision", "transformers")


@dataclass(frozen=True)
class PatchFeatures:
    """The features of one row.

    Attributes:
        patches: Outputs of the vision tower, [patches of all slices, vision width], or of the merger, [tokens of all
            slices, width of the language model].
        sizes: int32 [slices, 2], (rows, columns) of each slice in patches, before any merging.
        merged: Whether they are the merger's.
    """

    patches: torch.Tensor
    sizes: torch.Tensor
    merged: bool = False


@dataclass(frozen=True)
class Encoding:
    """How features are computed.

    Attributes:
        device: Device of the modules.
        merged: Whether by tower and merger, or by the tower alone.
        dtype: Type of the result; by default that of the modules' output.
    """

    device: torch.device
    merged: bool = False
    dtype: torch.dtype | None = None


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
        merged: Whether they are outputs of the merger.
    """

    folder: Path
    sizes: torch.Tensor
    first_slice: torch.Tensor
    first_patch: torch.Tensor
    width: int
    dtype: torch.dtype
    merged: bool

    @property
    def bytes(self) -> int:
        """Size of the features on disk."""
        return int(self.first_patch[-1]) * self.width * self.dtype.itemsize

    @property
    def is_finished(self) -> bool:
        """Whether the store exists completely."""
        return (self.folder / INDEX_FILE).is_file()


class FeatureStore:
    """A finished store. It is not deleted while it is open; a copy sent to another process opens the file again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = (folder / INDEX_FILE).open("rb")
        fcntl.flock(self._open, fcntl.LOCK_SH)
        index = load_file(folder / INDEX_FILE)
        with safe_open(folder / INDEX_FILE, framework="pt") as file:
            metadata = file.metadata()
        self._sizes, self._first_slice, self._first_patch = (
            index[name] for name in ("sizes", "first_slice", "first_patch")
        )
        width, dtype = int(metadata["width"]), getattr(torch, metadata["dtype"])
        self._merged = metadata.get("merged") == "true"
        count = int(self._first_patch[-1])
        path = str(folder / PATCHES_FILE)
        stored = torch.from_file(path, False, count * width, dtype=dtype) if count else torch.empty(0)
        self._patches = stored.to(dtype).view(count, width)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path]]:
        return type(self), (self.folder,)

    def __getitem__(self, row: int) -> PatchFeatures:
        slices = slice(int(self._first_slice[row]), int(self._first_slice[row + 1]))
        patches = slice(int(self._first_patch[row]), int(self._first_patch[row + 1]))
        return PatchFeatures(self._patches[patches], self._sizes[slices], self._merged)


def is_reusable(model: nn.Module, tower: nn.Module) -> bool:
    """Whether a model's vision tower gives the same output for an image each time."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    has_dropout = bool(getattr(vision, "attention_dropout", 0.0))
    return not has_dropout and not any(parameter.requires_grad for parameter in tower.parameters())


def choose_encoding(model: PreTrainedModel, generation: Generation, training: TransformersArguments) -> Encoding:
    """The last output of a model's vision modules that a training does not change: the merger's if that is frozen."""
    merger = model.get_submodule(generation.merger)
    merged = not any(parameter.requires_grad for parameter in merger.parameters())
    return Encoding(training.device, merged, _computing_type(training))


def prepare_stores(
    model: PreTrainedModel,
    generation: Generation,
    shards: Path,
    splits: list[Split],
    cache: Path,
    training: TransformersArguments,
    report: Callable[[str], None],
    epochs: float = 2,
    reserve: int = 0,
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
        epochs: How often the training uses the data.
        reserve: Bytes that the training is going to write to the same disk.

    Returns:
        The folder of each split's store; nothing if there is no room for them, or computing them again is faster, which
        is reported.
    """
    tower, merger = model.get_submodule(generation.vision_tower), model.get_submodule(generation.merger)
    encoding = choose_encoding(model, generation, training)
    merged = encoding.merged
    modules = nn.ModuleList([tower, merger] if merged else [tower])
    with _gathered(modules), torch.no_grad(), mixed_precision(training), _in_evaluation(modules):
        modules.to(training.device)
        key = _digest(model, tower, modules, training, encoding)
        readers = {split: ShardReader(shards, split) for split in splits}
        fixed = merged and generation.fixed_tokens
        layouts = {split: _layout(model, encoding, readers[split], cache, key, fixed) for split in splits}
        missing = {split for split, layout in layouts.items() if not layout.is_finished}
        for split in layouts.keys() - missing:
            os.utime(layouts[split].folder / INDEX_FILE)  # the time of the last use
        room = _reserve_space(layouts, missing, cache, training, report, reserve)
        if not room or not _is_faster(model, encoding, layouts["train"], readers["train"], training, epochs, report):
            return {}
        report(room)
        for split, layout in layouts.items():
            _write_store(model, encoding, layout, readers[split], training, split not in missing)
    return {split: layout.folder for split, layout in layouts.items()}


def feature_argument(merged: bool) -> str:
    """The model's argument for features: of the merger, or of the vision tower."""
    return "vision_features" if merged else "patch_features"


def feature_arguments(rows: list[PatchFeatures]) -> dict[str, torch.Tensor]:
    """The model's arguments for the features of a batch."""
    return {
        feature_argument(rows[0].merged): torch.cat([row.patches for row in rows]),
        "target_sizes": torch.cat([row.sizes for row in rows]),
    }


def compute_features(
    model: PreTrainedModel, encoding: Encoding, pixels: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Compute the features of slices.

    Args:
        model: The base model.
        encoding: By which modules, where, and in which type.
        pixels: `pixel_values` of `batch.collate`.
        sizes: `target_sizes` of `batch.collate`.

    Returns:
        [vectors of all slices, width].
    """
    encode: Any = model.encode_images if encoding.merged else model.encode_patches
    features: torch.Tensor = encode(pixels.to(encoding.device), sizes.to(encoding.device))
    return features.to(encoding.dtype or features.dtype)


def _layout(
    model: PreTrainedModel, encoding: Encoding, reader: ShardReader, cache: Path, key: str, has_fixed_number: bool
) -> StoreLayout:
    """Find where the features of each row are going to be.

    Args:
        model: The base model.
        encoding: How features are computed.
        reader: The rows.
        cache: Folder whose subfolder `features/` contains the stores.
        key: Digest of everything but the rows.
        has_fixed_number: Whether every slice has the same number of vectors, as after a resampler.
    """
    sizes, first_slice = map(torch.from_numpy, reader.slice_sizes())
    patch_size = reader.manifest.patch_size
    pixels = torch.zeros(1, 3, patch_size, patch_size * _BLANK_SIDE**2)
    blank_features = compute_features(model, encoding, pixels, torch.full((1, 2), _BLANK_SIDE, dtype=torch.int32))
    images = {
        "shards": [shard.sha256 for shard in reader.manifest.shards.get(reader.split, [])],
        "codec": reader.manifest.codec,
        "slicing": reader.manifest.slicing,
    }
    name = hashlib.sha256(json.dumps([key, images], sort_keys=True).encode()).hexdigest()[:32]
    if has_fixed_number:
        vectors = torch.full((len(sizes),), len(blank_features))
    else:
        vectors = sizes.long().prod(1) // (_BLANK_SIDE**2 // len(blank_features))
    first_patch = torch.cat([torch.zeros(1, dtype=torch.long), vectors.cumsum(0)])[first_slice]
    folder = cache / "features" / name
    width, dtype = blank_features.shape[-1], blank_features.dtype
    return StoreLayout(folder, sizes, first_slice, first_patch, width, dtype, encoding.merged)


def _reserve_space(
    layouts: dict[Split, StoreLayout],
    missing: set[Split],
    cache: Path,
    training: TransformersArguments,
    report: Callable[[str], None],
    reserve: int,
) -> str:
    """Make room for the missing stores.

    Returns:
        A sentence about the stores; empty if any machine has too little room for them, which is reported.
    """
    needed = sum(layouts[split].bytes for split in missing)
    stores = cache / "features"
    cache.mkdir(parents=True, exist_ok=True)
    if needed and training.local_process_index == 0:
        delete_unused_stores(stores, needed, reserve, {layout.folder for layout in layouts.values()})
    _wait_for_all(training)
    subject = f"vision features of {sum(len(layout.sizes) for layout in layouts.values()):,} slices"
    room = find_room(cache, reserve)
    # Another machine may have no store yet, so each of them asks.
    if not _all_agree(not needed or needed <= room.bytes, training):
        report(
            f"{subject} need {needed / 1e9:.2f} GB, but {cache} has room for {room}, so they are computed again in "
            "each epoch; give --cache_dir a folder on a larger disk to store them."
        )
        return ""
    where = f"computed once and stored in {stores} ({needed / 1e9:.2f} GB of {room})"
    return f"{subject} are {where if missing else f'found in {stores}'}"


def _is_faster(
    model: PreTrainedModel,
    encoding: Encoding,
    layout: StoreLayout,
    reader: ShardReader,
    training: TransformersArguments,
    epochs: float,
    report: Callable[[str], None],
) -> bool:
    """Time a batch of each way; a store that would be slower than computing its features again is reported."""
    if not layout.bytes:
        return True
    share = _share(layout, training)
    patches = _patches_before(layout)[share.start : share.stop + 1].diff().numpy()
    with_images = np.flatnonzero(patches)
    timing = Timing()
    if len(with_images):
        # As many as one pass through the tower takes.
        number = int(np.searchsorted(patches[with_images].cumsum(), MIN_BATCH_PATCHES)) + 1
        rows = (share.start + with_images[:number]).tolist()
        timing = _time_batch(model, encoding, layout, reader, rows)
    timing = timing.summed(training.device)
    if timing.favors_store(epochs, layout.is_finished, training.dataloader_num_workers):
        return True
    report(
        f"vision features are computed again in each epoch: to read a batch of them from {layout.folder.parent} takes "
        f"{timing.read:.2f} s, to compute it {timing.compute:.2f} s."
    )
    return False


def _time_batch(
    model: PreTrainedModel, encoding: Encoding, layout: StoreLayout, reader: ShardReader, rows: list[int]
) -> Timing:
    collate_rows = _collator(reader)
    images: dict[str, torch.Tensor] = {}
    preparation = seconds(encoding.device, lambda: images.update(collate_rows([reader[row] for row in rows])))

    def compute() -> torch.Tensor:
        return compute_features(model, encoding, images["pixel_values"], images["target_sizes"])

    features = compute().cpu()  # libraries prepare themselves in the first call
    computation = seconds(encoding.device, compute)
    if layout.is_finished:
        store = FeatureStore(layout.folder)

        def read() -> None:
            for row in rows:
                store[row].patches.clone().to(encoding.device)

        return Timing(preparation, computation, time_reading(read, layout.bytes, encoding.device))
    layout.folder.parent.mkdir(parents=True, exist_ok=True)
    return Timing(preparation, computation, time_disk(features, layout.folder.parent, layout.bytes, encoding.device))


def _write_store(
    model: PreTrainedModel,
    encoding: Encoding,
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
            with (staging / PATCHES_FILE).open("wb") as file:
                file.truncate(layout.bytes)
        _wait_for_all(training)
        if not is_finished and layout.bytes:
            _write_features(staging / PATCHES_FILE, model, encoding, layout, reader, training)
        _wait_for_all(training)
        if is_first and not is_finished:
            save_file(
                {name: getattr(layout, name) for name in ("sizes", "first_slice", "first_patch")},
                staging / INDEX_FILE,
                {
                    "width": str(layout.width),
                    "dtype": str(layout.dtype).removeprefix("torch."),
                    "merged": str(layout.merged).lower(),
                },
            )
            if not layout.is_finished:
                staging.rename(layout.folder)
        _wait_for_all(training)
    finally:
        if is_first:
            shutil.rmtree(staging, ignore_errors=True)


def _write_features(
    path: Path,
    model: PreTrainedModel,
    encoding: Encoding,
    layout: StoreLayout,
    reader: ShardReader,
    training: TransformersArguments,
) -> None:
    """Compute the features of this process's share of the rows, and write them into the file."""
    processes = int(environment.LOCAL_WORLD_SIZE.read() or 1)
    share = _share(layout, training)
    loader = DataLoader(
        Explained(_RowDataset(reader)),
        batch_sampler=map(list, divide(share, _patches_before(layout).numpy(), MIN_BATCH_PATCHES)),
        collate_fn=HandOver(_collator(reader)),
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
            features = compute_features(model, encoding, images["pixel_values"], images["target_sizes"])
            file[position : position + len(features)] = features.cpu()
            position += len(features)
            bar.update(len(images["target_sizes"]) * processes)


def _share(layout: StoreLayout, training: TransformersArguments) -> range:
    """The rows whose features this process computes: neighbors that have about as many patches as any other share."""
    processes, number = int(environment.LOCAL_WORLD_SIZE.read() or 1), training.local_process_index
    patches = _patches_before(layout)
    middles = (patches[:-1] + patches[1:]).numpy() / 2
    first, end = np.searchsorted(middles, [int(patches[-1]) * share / processes for share in (number, number + 1)])
    return range(int(first), len(middles) if number + 1 == processes else int(end))


def _patches_before(layout: StoreLayout) -> torch.Tensor:
    """Number of patches before each row, int [rows + 1]; their number decides how long a row takes."""
    patches = layout.sizes.long().prod(1).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.long), patches])[layout.first_slice]


def _collator(reader: ShardReader) -> partial[dict[str, torch.Tensor]]:
    manifest = reader.manifest
    return partial(
        collate,
        pad_token_id=manifest.pad_token_id,
        patch_size=manifest.patch_size,
        padding_side="right",
        resampler=manifest.slicing["resampler"],
        normalized=False,
    )


class _RowDataset(Dataset[ModelInput]):
    """The rows with their images; a loader's workers open the files again."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> ModelInput:
        row: ModelInput = self.reader[position]
        return row


def divide(rows: range, patches_before: NDArray[np.int64], least: int) -> list[range]:
    """Divide rows into groups of neighbors with at least so many patches each, except the last one.

    Args:
        rows: Numbers of the rows.
        patches_before: int [rows + 1], number of patches before each row.
        least: Number of patches of a group.
    """
    groups: list[range] = []
    start = rows.start
    while start < rows.stop:
        end = min(int(np.searchsorted(patches_before, patches_before[start] + least)), rows.stop)
        groups.append(range(start, end))
        start = end
    return groups


def _digest(
    model: PreTrainedModel, tower: nn.Module, modules: nn.Module, training: TransformersArguments, encoding: Encoding
) -> str:
    """Digest of everything that determines the features of given pixels."""
    digest = hashlib.sha256()
    settings = {
        "model": type(model).__name__,
        "vision": model.config.vision_config.to_dict(),
        "downsample_mode": getattr(model.config, "downsample_mode", None),
        "attention": getattr(getattr(tower, "config", None), "_attn_implementation", None),
        "mixed": [training.bf16, training.fp16],
        "device": training.device.type,
        "features": FEATURES_VERSION,
        "merged": encoding.merged,
        "type": str(encoding.dtype),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in modules.named_parameters():
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


@contextmanager
def _in_evaluation(modules: nn.Module) -> Iterator[None]:
    was_training = {module: module.training for module in modules.modules()}
    modules.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _computing_type(training: TransformersArguments) -> torch.dtype | None:
    """The type of a mixed-precision training, in which the next module computes: its norms return wider numbers."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def mixed_precision(training: TransformersArguments) -> Any:
    """The Trainer's mixed precision, so that features equal those that the model computes in a training."""
    dtype = _computing_type(training)
    return nullcontext() if dtype is None else torch.autocast(training.device.type, dtype)


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
