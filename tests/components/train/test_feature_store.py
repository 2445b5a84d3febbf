import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minicpmv_finetune.components.train import feature_room, feature_store, finetune
from minicpmv_finetune.components.train.arguments import TrainingArguments
from minicpmv_finetune.components.train.feature_room import find_room
from minicpmv_finetune.components.train.feature_store import (
    Encoding,
    FeatureStore,
    StoreLayout,
    compute_features,
    feature_arguments,
    is_reusable,
    prepare_stores,
)
from minicpmv_finetune.components.train.feature_timing import Timing
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.shards.format import ShardReader

Make = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def model(tiny_46: Path) -> PreTrainedModel:
    model = load_model(tiny_46, torch.float32)[0]
    model.get_submodule(detect_generation(tiny_46).vision_tower).requires_grad_(False)
    return model


@pytest.fixture
def make(tiny_46: Path, uneven_shards: Path, tmp_path: Path) -> Make:
    """A function that makes the store of the training split; returns its folder and what was reported."""

    def make(model: PreTrainedModel, **settings: Any) -> tuple[Path, list[str]]:
        training = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
        reports: list[str] = []
        stores = prepare_stores(
            model, detect_generation(tiny_46), uneven_shards, ["train"], tmp_path / "cache", training, reports.append
        )
        return stores.get("train", Path()), reports

    return make


def test_the_store_contains_the_towers_outputs(model: PreTrainedModel, make: Make, uneven_shards: Path) -> None:
    folder, reports = make(model)
    reader, store = ShardReader(uneven_shards, "train"), FeatureStore(folder)
    slices = 0
    for number, row in enumerate(reader):
        assert len(store[number].sizes) == len(row.slices)
        if not row.slices:
            continue
        pixels = collate([row], 0, 14, "right")
        expected = compute_features(
            model, Encoding(torch.device("cpu")), pixels["pixel_values"], pixels["target_sizes"]
        )
        torch.testing.assert_close(store[number].patches, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(store[number].sizes, pixels["target_sizes"])
        slices += len(row.slices)
    gigabytes = (folder / "patches.bin").stat().st_size / 1e9
    (report,) = reports
    stored = (
        f"vision features of {slices} slices are computed once and stored in {folder.parent} ({gigabytes:.2f} GB of"
    )
    assert report.startswith(stored)
    assert "GB are free, of which 1 GB are kept for checkpoints and the result" in report
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_store_is_found_again_and_another_tower_has_its_own(model: PreTrainedModel, make: Make) -> None:
    first, _ = make(model)
    before = (first / "patches.bin").stat().st_mtime_ns
    again, reports = make(model)
    assert again == first
    assert "found in" in reports[0]
    assert (first / "patches.bin").stat().st_mtime_ns == before
    _change_tower(model)
    assert make(model)[0] != first


def test_in_bf16_features_are_stored_in_bf16(model: PreTrainedModel, make: Make) -> None:
    wide, narrow = make(model)[0], make(model, bf16=True)[0]
    assert 2 * (narrow / "patches.bin").stat().st_size == (wide / "patches.bin").stat().st_size
    assert FeatureStore(narrow)[0].patches.dtype == torch.bfloat16


def test_with_a_frozen_merger_its_output_is_stored(model: Any, make: Make, uneven_shards: Path) -> None:
    larger = make(model)[0]
    model.model.merger.requires_grad_(False)
    folder = make(model)[0]
    assert folder != larger
    assert (folder / "patches.bin").stat().st_size < (larger / "patches.bin").stat().st_size
    store, rows = FeatureStore(folder), list(ShardReader(uneven_shards, "train"))[:4]
    plain = model.train()(**collate(rows, 0, 14, "right")).loss
    batch = collate([replace(row, slices=[]) for row in rows], 0, 14, "right")
    model.model.vision_tower.forward = model.model.merger.forward = None  # neither runs
    features = feature_arguments([store[number] for number in range(len(rows))])
    torch.testing.assert_close(model(**batch, **features).loss, plain)
    alone = next(number for number in range(len(rows)) if not len(store[number].sizes))
    batch = collate([rows[alone]], 0, 14, "right")
    model(**batch, **feature_arguments([store[alone]])).loss.backward()


def test_processes_share_the_patches_and_not_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.tensor([[8, 8], [1, 1], [1, 1], [1, 1], [1, 1], [8, 8]])
    first_slice = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 6])  # of eight rows, two of them without a slice
    layout = StoreLayout(Path(), sizes, first_slice, first_slice, 1, torch.float32, False)
    for processes in (1, 2, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        ranks: list[Any] = [SimpleNamespace(local_process_index=number) for number in range(processes)]
        shares = [feature_store._share(layout, rank) for rank in ranks]
        assert [row for share in shares for row in share] == list(range(8))
        patches = [sum(int(sizes[first_slice[n] : first_slice[n + 1]].prod(1).sum()) for n in rows) for rows in shares]
        assert max(patches) == {1: 132, 2: 66, 3: 64}[processes]


@pytest.mark.parametrize(
    ("strategy", "given", "kept", "size"),
    [
        ("no", {"save_strategy"}, 2, 4),
        ("no", set(), 2, 40),  # the time decides when they are saved
        ("steps", {"save_steps"}, 2, 40),
        ("steps", {"save_steps"}, 1, 28),
    ],
)
def test_room_is_kept_for_the_result_and_for_checkpoints_if_there_are_any(
    strategy: str, given: set[str], kept: int, size: int
) -> None:
    arguments: Any = SimpleNamespace(training=SimpleNamespace(save_strategy=strategy), given=given)
    assert finetune._bytes_to_write(arguments, 1000, kept) == 1000 * size


def test_the_limit_of_a_pods_volume_is_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "download").write_bytes(bytes(2**20))
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900 * 10**9, total=10**12))
    assert find_room(cache, 10**9).bytes == 899 * 10**9 - 2**30
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert find_room(cache, 0).bytes == 750 * 10**9 - 2**30
    monkeypatch.setenv("MINICPMV_FINETUNE_SCRATCH_LIMIT", "500Gi")
    room = find_room(cache, 10**9)
    assert 498 * 2**30 - 10**9 < room.bytes <= 499 * 2**30 - 10**9 - 2**20
    assert "the volume's limit is 537 GB" in room.reason
    monkeypatch.setenv("MINICPMV_FINETUNE_SCRATCH_LIMIT", "1Pi")  # any size that a profile may have
    assert find_room(cache, 0).bytes == 750 * 10**9 - 2**30
    monkeypatch.setenv("MINICPMV_FINETUNE_SCRATCH_LIMIT", "much")
    with pytest.raises(UserError, match="give one such as 500Gi"):
        find_room(cache, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert find_room(cache, 0).bytes == 750 * 10**9 - 2**30, "the cache is on another volume"


@pytest.mark.parametrize(
    ("timing", "exists", "workers", "expected"),
    [
        (Timing(images=1, compute=1, read=0.1), False, 0, True),
        (Timing(images=0, compute=1, read=0.6), False, 0, True),
        (Timing(images=0, compute=1, read=0.7), False, 0, False),  # three passes do not make up for the first one
        (Timing(images=0, compute=1, read=0.9), True, 0, True),
        (Timing(images=8, compute=1, read=3), True, 0, True),
        (Timing(images=8, compute=1, read=30), True, 4, False),
        (Timing(), False, 0, True),
    ],
)
def test_the_faster_way_is_taken(timing: Timing, exists: bool, workers: int, expected: bool) -> None:
    assert timing.favors_store(3, exists, workers) is expected


def test_a_slow_disk_is_reported_and_nothing_is_stored(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feature_store, "time_disk", lambda *_: 100.0)
    folder, reports = make(model)
    assert folder == Path()
    assert "to read a batch of them" in reports[0]
    assert "takes 100.00 s" in reports[0]
    assert not list((tmp_path / "cache" / "features").iterdir())


def _change_tower(model: Any) -> None:
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[0] += 1e-3


def test_a_full_disk_is_reported_and_nothing_is_written(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feature_room, "_SPARE_BYTES", 2**62)
    folder, reports = make(model)
    assert folder == Path()
    assert "give --cache_dir a folder on a larger disk" in reports[0]
    assert not list((tmp_path / "cache").iterdir())


def test_old_stores_are_deleted_for_a_new_one_unless_they_are_open(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_another() -> Path:
        _change_tower(model)
        return make(model)[0]

    def set_last_use(store: Path, hours_ago: int) -> None:
        then = time.time() - 3600 * hours_ago
        os.utime(store / "index.safetensors", (then, then))

    opened, older, newer, just_found = make_another(), make_another(), make_another(), make_another()
    for used, hours_ago in ((opened, 9), (older, 5), (newer, 3)):
        set_last_use(used, hours_ago)
    store = FeatureStore(opened)
    size = (older / "patches.bin").stat().st_size
    spare = shutil.disk_usage(older).free

    def set_free_space(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    # Deleting a store does not change this number, so no new store is computed; only the deletions are tested.
    monkeypatch.setattr(feature_room, "_SPARE_BYTES", spare)
    set_free_space(spare + size - 3 * size)
    make_another()
    assert all(path.exists() for path in (opened, older, newer, just_found)), "not enough space would become free"
    set_free_space(spare + size - size // 2)
    make_another()
    assert [path.exists() for path in (opened, older, newer, just_found)] == [True, False, True, True]
    assert len(store[0].patches)


def test_features_of_a_trained_tower_or_one_with_dropout_are_not_reusable(model: Any) -> None:
    tower = model.model.vision_tower
    assert is_reusable(model, tower)
    model.config.vision_config.attention_dropout = 0.1
    assert not is_reusable(model, tower)
    model.config.vision_config.attention_dropout = 0.0
    tower.post_layernorm.bias.requires_grad_(True)
    assert not is_reusable(model, tower)


def test_a_batch_without_an_image_gives_the_merger_gradients_of_zero(
    model: Any, make: Make, uneven_shards: Path
) -> None:
    folder, _ = make(model)
    reader, store = ShardReader(uneven_shards, "train", images=False), FeatureStore(folder)
    number = next(number for number in range(len(reader)) if not len(store[number].sizes))
    batch = collate([reader[number]], 0, 14, "right")
    plain = model.train()(**batch).loss
    loss = model(**batch, **feature_arguments([store[number]])).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert all(p.grad is not None and not p.grad.any() for p in model.model.merger.parameters())
