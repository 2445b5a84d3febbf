"""Stored features, logits of supervised tokens only, and packing leave the losses of each step unchanged."""

from pathlib import Path

import pytest

from minicpmv_finetune.reports.training_record import read_record
from tests.components.train.conftest import Train

COMMON = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
PLAIN = "--supervised_logits_only false --reuse_vision_features false"
FROZEN = f"{COMMON} --tune_vision false --num_train_epochs 2 --per_device_train_batch_size 8 --eval_strategy epoch"


def test_stored_features_and_supervised_logits_give_the_same_losses(
    uneven_shards: Path, train: Train, tmp_path: Path
) -> None:
    plain = train(uneven_shards, f"{FROZEN} {PLAIN}")
    fast = train(uneven_shards, f"{FROZEN} --cache_dir {tmp_path / 'cache'}")
    assert list((tmp_path / "cache" / "features").iterdir())
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    evaluated = [
        [entry for entry in read_record(training.folder).history if "eval_loss" in entry] for training in (plain, fast)
    ]
    for expected, found in zip(*evaluated, strict=True):
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
        assert found["eval_token_accuracy"] == pytest.approx(expected["eval_token_accuracy"], abs=0.02)


def test_with_packing_two_processes_have_the_losses_of_one(uneven_shards: Path, train: Train) -> None:
    flags = f"{COMMON} --packing true --model_max_length 128 --max_steps 4"
    one = train(uneven_shards, f"{flags} --per_device_train_batch_size 2")
    two = train(uneven_shards, f"{flags} --per_device_train_batch_size 1", 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert read_record(one.folder).metrics["padding"] == 0


def test_batches_by_tokens_give_the_step_of_one_large_batch(uneven_shards: Path, train: Train) -> None:
    large = train(uneven_shards, f"{COMMON} --max_steps 1 --per_device_train_batch_size 40")
    flags = f"{COMMON} --max_steps 1 --tokens_per_batch 256 --gradient_accumulation_steps 40"  # a whole epoch
    small = train(uneven_shards, flags, 2)
    records = [read_record(training.folder) for training in (small, large)]
    for name in ("loss", "grad_norm"):
        found, expected = (record.history[0][name] for record in records)
        assert found == pytest.approx(expected, rel=1e-4)
    metrics = records[0].metrics
    assert metrics["padding"] == 0
    assert 0.5 * 256 < metrics["tokens/batch"] <= 256


@pytest.mark.parametrize(
    ("more", "processes"),
    [
        ("--per_device_train_batch_size 32", 1),
        ("--per_device_train_batch_size 16 --reuse_vision_features false", 2),
        ("--per_device_train_batch_size 32 --packing true --model_max_length 512", 1),
        ("--tokens_per_batch 256 --gradient_accumulation_steps 32", 2),
    ],
)
def test_shared_images_give_the_steps_of_batches_without_them(
    shared_shards: Path, train: Train, more: str, processes: int
) -> None:
    flags = f"{COMMON} --tune_vision false --num_train_epochs 2"
    plain = train(shared_shards, f"{flags} {PLAIN} --per_device_train_batch_size 32")
    shared = train(shared_shards, f"{flags} --share_images true {more}", processes)
    records = [read_record(training.folder) for training in (plain, shared)]
    for name in ("loss", "grad_norm"):
        expected, found = ([step[name] for step in record.history if name in step] for record in records)
        assert len(found) == 2
        assert found == pytest.approx(expected, rel=1e-4)
    assert records[1].metrics["shared_tokens"] == pytest.approx(288 / 1392)


@pytest.mark.faults_only
def test_stored_features_work_with_two_processes_and_zero3(uneven_shards: Path, train: Train, tmp_path: Path) -> None:
    flags = f"{COMMON} --tune_vision false --max_steps 22"
    one = train(uneven_shards, f"{flags} {PLAIN} --per_device_train_batch_size 4")
    cache = f"--cache_dir {tmp_path / 'cache'}"
    two = train(uneven_shards, f"{flags} {cache} --per_device_train_batch_size 2 --strategy zero3", 2)
    assert list((tmp_path / "cache" / "features").iterdir())
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
