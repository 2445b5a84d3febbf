"""The vision of the next batch, computed beside the language of this one: the same features, losses, and errors."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicpmv_finetune.components.train import vision_ahead
from minicpmv_finetune.components.train.feature_store import Encoding, compute_features
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.components.train.vision_ahead import VisionAhead, favors_helpers
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.estimate.published import published_model
from minicpmv_finetune.minicpmv.batch import pack_patches
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.reports.training_record import read_record
from tests.components.train import worker_with_helpers
from tests.components.train.conftest import Train

COMMON = "--use_lora true --tune_llm false --tune_vision false --lora_r 4 --num_train_epochs 1 --save_strategy no"


@pytest.fixture(autouse=True)
def make_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parts be as small as the slices of these tests, and few be enough."""
    monkeypatch.setattr(vision_ahead, "_PART_PATCHES", 16)
    monkeypatch.setattr(vision_ahead, "_PARTS_PER_THREAD", 0)


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _batch(*sides: tuple[int, int]) -> dict[str, Any]:
    """A batch with slices of so many rows and columns of patches."""
    numbers = np.random.default_rng(len(sides))
    slices = [numbers.integers(0, 256, (14 * rows, 14 * columns, 3), dtype=np.uint8) for rows, columns in sides]
    ids = torch.arange(20, 28).unsqueeze(0)
    if not slices:
        return {"input_ids": ids, "labels": ids}
    pixels = pack_patches(slices, 14, normalized=False).unsqueeze(0)
    sizes = torch.tensor(sides, dtype=torch.int32)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "target_sizes": sizes}


def _batches() -> list[dict[str, Any]]:
    return [_batch((4, 4), (4, 4), (8, 4)), _batch(), _batch((8, 8)), _batch((4, 4), (4, 8), (4, 4), (8, 8), (4, 4))]


def _sum_patches(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return pixels.float().view(3, 14, -1, 14).sum((0, 1, 3)).unsqueeze(1)


@contextmanager
def _busy(ahead: VisionAhead) -> Iterator[None]:
    """Keep all helpers from beginning anything."""
    ended = threading.Event()
    for _ in range(ahead._helpers):
        ahead._pool.submit(ended.wait, 60)
    try:
        yield
    finally:
        ended.set()


@pytest.mark.parametrize("version", ["2.6", "4.0", "4.5", "4.6", "4.7"])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.usefixtures("threads")
def test_features_are_those_of_the_whole_batch(version: str, merged: bool, tiny: Callable[[str], Path]) -> None:
    model, _ = load_model(tiny(version), torch.float32)
    encoding = Encoding(torch.device("cpu"), merged)

    def compute(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return compute_features(model, encoding, pixels, sizes)

    ahead = VisionAhead(compute, "features", lambda batch: True)
    for batch, expected in zip(ahead.read(iter(_batches())), _batches(), strict=True):
        ahead.finish(batch)
        assert "pixel_values" not in batch
        if "target_sizes" in expected:
            whole = compute(expected["pixel_values"], expected["target_sizes"])
            torch.testing.assert_close(batch["features"], whole, rtol=1e-4, atol=1e-5)
            assert torch.equal(batch["target_sizes"], expected["target_sizes"])


def test_a_part_is_computed_while_the_batch_before_it_is_used(threads: int) -> None:
    begun, allowed = threading.Event(), threading.Event()
    computing: list[tuple[str, int]] = []

    def compute(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert allowed.wait(60)
        computing.append((threading.current_thread().name, torch.get_num_threads()))
        return _sum_patches(pixels, sizes)

    batches = _batches()
    source = iter([batches[1], batches[0]])
    ahead = VisionAhead(compute, "features", lambda batch: True)
    first = next(ahead.read(source))
    assert begun.wait(60)
    ahead.finish(first)
    assert torch.get_num_threads() == threads - threads // 2
    allowed.set()
    ahead.pause()
    assert torch.get_num_threads() == threads
    assert {number for _, number in computing} == {1}
    assert any(name.startswith("vision") for name, _ in computing)
    (second,) = ahead.read(source)
    ahead.finish(second)
    assert torch.get_num_threads() == threads
    expected = _batches()[0]
    assert torch.equal(second["features"], _sum_patches(expected["pixel_values"], expected["target_sizes"]))


def test_what_no_helper_has_begun_is_computed_by_the_training(threads: int) -> None:
    computing = set()

    def compute(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        computing.add((threading.current_thread().name, torch.get_num_threads()))
        return _sum_patches(pixels, sizes)

    ahead = VisionAhead(compute, "features", lambda batch: True)
    with _busy(ahead):
        (batch,) = ahead.read(iter([_batches()[3]]))
        ahead.finish(batch)
    assert computing == {(threading.main_thread().name, 1)}
    expected = _batches()[3]
    assert torch.equal(batch["features"], _sum_patches(expected["pixel_values"], expected["target_sizes"]))


def test_a_training_that_ends_leaves_the_next_batch_alone(threads: int) -> None:
    computed: list[torch.Tensor] = []

    def compute(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        computed.append(sizes)
        return _sum_patches(pixels, sizes)

    batches = _batches()
    ahead = VisionAhead(compute, "features", lambda batch: True)
    with _busy(ahead):
        ahead.finish(next(ahead.read(iter([batches[1], batches[0]]))))
        assert torch.get_num_threads() < threads
        ahead.close()
        assert torch.get_num_threads() == threads
    ahead._pool.shutdown(wait=True)
    assert not computed


def test_few_parts_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(vision_ahead, "_PARTS_PER_THREAD", 2)
    ahead = VisionAhead(_sum_patches, "features", lambda batch: True)
    few, enough = _batch(*[(4, 4)] * (2 * threads - 1)), _batch(*[(4, 4)] * 2 * threads)
    for batch in ahead.read(iter([few, enough])):
        ahead.finish(batch)
    assert "pixel_values" in few
    assert "features" in enough


def test_threads_are_left_to_the_helpers_until_all_batches_of_a_step_are_done(threads: int) -> None:
    batches = _batches()
    ahead = VisionAhead(_sum_patches, "features", lambda batch: True)
    counts = []
    for batch in list(ahead.read(iter([batches[0], batches[2], batches[3]]))):
        ahead.finish(batch)
        counts.append(torch.get_num_threads())
    assert counts == [threads - threads // 2] * 2 + [threads]


@pytest.mark.usefixtures("threads")
def test_several_batches_are_read_before_the_first_is_used_and_epochs_follow_each_other() -> None:
    ahead = VisionAhead(_sum_patches, "features", lambda batch: True)
    for _ in range(2):
        source, sizes = iter(_batches()), []
        for count in (3, 1):
            reader = ahead.read(source)
            read = [next(reader) for _ in range(count)]
            for batch in read:
                ahead.finish(batch)
                sizes.append(len(batch.get("features", ())))
        assert sizes == [64, 0, 64, 144]
        assert list(ahead.read(source)) == []


@pytest.mark.usefixtures("threads")
def test_an_error_is_raised_when_its_batch_is_used(tiny_46: Path, make_trainer: Callable[..., MiniCPMVTrainer]) -> None:
    def fail(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = load_model(tiny_46, torch.float32)[0]
    trainer = make_trainer(model)
    trainer._vision_ahead = ahead = VisionAhead(fail, "patch_features", lambda batch: True)
    (batch,) = ahead.read(iter([_batch((4, 4)) | {"rows": [0]}]))
    with pytest.raises(UserError, match="ran out of memory at step 1"):
        trainer.training_step(model, batch)
    broken = {"error": UserError("damaged")}
    assert list(ahead.read(iter([broken]))) == [broken]


@pytest.mark.parametrize(
    ("version", "sides", "tokens", "expected"),
    [
        ("4.6", [(32, 32)] * 4, 300, True),
        ("4.6", [(32, 32)] * 4, 30_000, False),
        ("4.6", [], 300, False),
        ("2.6", [(32, 32)] * 4, 300, False),
    ],
)
def test_vision_is_computed_ahead_where_it_takes_more_than_the_language(
    version: str, sides: list[tuple[int, int]], tokens: int, expected: bool
) -> None:
    batch = _batch(*sides) | {"input_ids": torch.zeros(1, tokens), "labels": torch.zeros(1, tokens)}
    batch["target_sizes"] = torch.tensor(sides).reshape(-1, 2)
    assert favors_helpers(published_model(version), {"language": 10_000_000}, batch) == expected


@pytest.mark.parametrize("more", ["", "--lora_modules_to_save none --gradient_accumulation_steps 2", "--packing true"])
def test_a_training_has_the_same_losses_in_each_run(uneven_shards: Path, train: Train, more: str) -> None:
    flags = f"{COMMON} --lora_dropout 0 --per_device_train_batch_size 2 --eval_strategy epoch {more}"
    plain = train(uneven_shards, flags)
    ahead, again = (train(uneven_shards, flags, worker=worker_with_helpers.__name__, run=run) for run in (1, 2))
    assert ahead.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ahead.eval_losses == pytest.approx(plain.eval_losses, rel=1e-5)
    assert again.losses == ahead.losses


def test_a_training_of_two_processes_continues_to_the_same_bits(
    uneven_shards: Path, tiny_46: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpmv_finetune.components.train.launch.WORKER", worker_with_helpers.__name__)
    kept = tmp_path / "kept"
    for name in ("first", "again"):
        paths = ["--model_name_or_path", str(tiny_46), "--data_path", str(uneven_shards)]
        places = ["--checkpoint_uri", str(kept), "--output_dir", str(tmp_path / name)]
        flags = "--use_lora true --tune_llm false --tune_vision false --per_device_train_batch_size 4 --max_steps 4"
        launch([*paths, *places, *flags.split(), "--save_strategy", "steps", "--save_steps", "2"], 2)
        for last in kept.glob("checkpoint-4*"):
            shutil.rmtree(last) if last.is_dir() else last.unlink()
    assert read_record(tmp_path / "again").continued_from == 2
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
