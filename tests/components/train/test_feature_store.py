import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minicpmv_finetune.components.train import feature_store
from minicpmv_finetune.components.train.arguments import TrainingArguments
from minicpmv_finetune.components.train.feature_store import (
    FeatureStore,
    compute_features,
    feature_arguments,
    is_reusable,
    prepare_stores,
)
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.shards.format import ShardReader

Make = Callable[[PreTrainedModel], tuple[Path, list[str]]]


@pytest.fixture
def model(tiny_46: Path) -> PreTrainedModel:
    model = load_model(tiny_46, torch.float32)[0]
    model.get_submodule(detect_generation(tiny_46).vision_tower).requires_grad_(False)
    return model


@pytest.fixture
def make(tiny_46: Path, uneven_shards: Path, tmp_path: Path) -> Make:
    """A function that makes the store of the training split; returns its folder and what was reported."""
    training = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)

    def make(model: PreTrainedModel) -> tuple[Path, list[str]]:
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
        expected = compute_features(model, torch.device("cpu"), pixels["pixel_values"], pixels["target_sizes"])
        torch.testing.assert_close(store[number].patches, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(store[number].sizes, pixels["target_sizes"])
        slices += len(row.slices)
    gigabytes = (folder / "patches.bin").stat().st_size / 1e9
    assert reports == [
        f"vision features of {slices} slices are computed once and stored in {folder.parent} ({gigabytes:.2f} GB)"
    ]
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


def _change_tower(model: Any) -> None:
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[0] += 1e-3


def test_a_full_disk_is_reported_and_nothing_is_written(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feature_store, "_SPARE_BYTES", 2**62)
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
    monkeypatch.setattr(feature_store, "_SPARE_BYTES", spare)
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
