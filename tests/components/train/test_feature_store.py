import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from minicpmv_finetune.components.train import feature_store
from minicpmv_finetune.components.train.arguments import TrainingArguments
from minicpmv_finetune.components.train.feature_store import FeatureStore, is_reusable, join, make_stores
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.shards.format import ShardReader


@pytest.fixture
def model(tiny_46: Path) -> PreTrainedModel:
    model = load_model(tiny_46, torch.float32)[0]
    model.get_submodule(detect_generation(tiny_46).vision_tower).requires_grad_(False)
    return model


@pytest.fixture
def make(tiny_46: Path, uneven_shards: Path, tmp_path: Path) -> Callable[[PreTrainedModel], tuple[Path, list[str]]]:
    training = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)

    def made(model: PreTrainedModel) -> tuple[Path, list[str]]:
        said: list[str] = []
        stores = make_stores(
            model, detect_generation(tiny_46), uneven_shards, ["train"], tmp_path / "cache", training, said.append
        )
        return stores.get("train", Path()), said

    return made


Make = Callable[[PreTrainedModel], tuple[Path, list[str]]]


def test_the_store_holds_what_the_tower_sees(model: PreTrainedModel, make: Make, uneven_shards: Path) -> None:
    folder, said = make(model)
    reader, store = ShardReader(uneven_shards, "train"), FeatureStore(folder)
    shown = 0
    for number, row in enumerate(reader):
        assert len(store[number].sizes) == len(row.slices)
        if not row.slices:
            continue
        pixels = collate([row], 0, 14, "right")
        expected = model.encode_patches(pixels["pixel_values"], pixels["target_sizes"])
        torch.testing.assert_close(store[number].patches, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(store[number].sizes, pixels["target_sizes"])
        shown += len(row.slices)
    assert said == [
        f"vision features of {shown} slices: computed once, {folder.joinpath('patches.bin').stat().st_size / 1e9:.2f} "
        f"GB in {folder.parent}"
    ]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_store_is_found_again_and_another_tower_has_its_own(model: PreTrainedModel, make: Make) -> None:
    first, _ = make(model)
    before = (first / "patches.bin").stat().st_mtime_ns
    again, said = make(model)
    assert again == first
    assert "found in" in said[0]
    assert (first / "patches.bin").stat().st_mtime_ns == before
    with torch.no_grad():
        model.model.vision_tower.post_layernorm.bias[0] += 1e-3
    assert make(model)[0] != first


def test_a_full_disk_is_said_and_nothing_is_written(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(feature_store, "_SPARE_BYTES", 2**62)
    folder, said = make(model)
    assert folder == Path()
    assert "--cache_dir leads to another disk" in said[0]
    assert not list((tmp_path / "cache").iterdir())


def test_old_stores_make_room_for_a_new_one_unless_they_are_open(
    model: PreTrainedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another() -> Path:
        with torch.no_grad():
            model.model.vision_tower.post_layernorm.bias[0] += 1e-3
        return make(model)[0]

    def used(store: Path, hours: int) -> None:
        then = time.time() - 3600 * hours
        os.utime(store / "index.safetensors", (then, then))

    opened, older, newer, just_found = another(), another(), another(), another()
    used(opened, 9), used(older, 5), used(newer, 3)
    store = FeatureStore(opened)
    size = (older / "patches.bin").stat().st_size
    spare = shutil.disk_usage(older).free

    def leaves(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    # The freed bytes are not seen in the figure above, so nothing is computed here; what went is what counts.
    monkeypatch.setattr(feature_store, "_SPARE_BYTES", spare)
    leaves(spare + size - 3 * size)
    another()
    assert all(one.exists() for one in (opened, older, newer, just_found)), "not enough would come free"
    leaves(spare + size - size // 2)
    another()
    assert [one.exists() for one in (opened, older, newer, just_found)] == [True, False, True, True]
    assert len(store[0].patches)


def test_a_tower_that_learns_or_drops_is_not_stored(model: PreTrainedModel) -> None:
    tower = model.model.vision_tower
    assert is_reusable(model, tower)
    model.config.vision_config.attention_dropout = 0.1
    assert not is_reusable(model, tower)
    model.config.vision_config.attention_dropout = 0.0
    tower.post_layernorm.bias.requires_grad_(True)
    assert not is_reusable(model, tower)


def test_a_batch_without_any_image_trains_the_merger_by_zero(
    model: PreTrainedModel, make: Make, uneven_shards: Path
) -> None:
    folder, _ = make(model)
    reader, store = ShardReader(uneven_shards, "train", images=False), FeatureStore(folder)
    number = next(number for number in range(len(reader)) if not len(store[number].sizes))
    batch = collate([reader[number]], 0, 14, "right")
    plain = model.train()(**batch).loss
    loss = model(**batch, **join([store[number]])).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    assert all(p.grad is not None and not p.grad.any() for p in model.model.merger.parameters())
