"""Stored features, logits of supervised tokens only, and packing leave the losses of each step unchanged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minicpmv_finetune.reports.training_record import read_record

COMMON = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
PLAIN = "--supervised_logits_only false --reuse_vision_features false"
FROZEN = f"{COMMON} --tune_vision false --num_train_epochs 2 --per_device_train_batch_size 8 --eval_strategy epoch"


def test_stored_features_and_supervised_logits_give_the_same_losses(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    plain = losses(uneven_shards, f"{FROZEN} {PLAIN}", out="plain")
    fast = losses(uneven_shards, f"{FROZEN} --cache_dir {tmp_path / 'cache'}", out="fast")
    assert list((tmp_path / "cache" / "features").iterdir())
    assert fast == pytest.approx(plain, rel=1e-4)
    evaluated = [
        [entry for entry in read_record(tmp_path / name).history if "eval_loss" in entry] for name in ("plain", "fast")
    ]
    for expected, found in zip(*evaluated, strict=True):
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
        assert found["eval_token_accuracy"] == pytest.approx(expected["eval_token_accuracy"], abs=0.02)


def test_with_packing_two_processes_have_the_losses_of_one(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    flags = f"{COMMON} --packing true --model_max_length 128 --max_steps 4"
    one = losses(uneven_shards, f"{flags} --per_device_train_batch_size 2", out="one")
    two = losses(uneven_shards, f"{flags} --per_device_train_batch_size 1", 2, out="two")
    assert two == pytest.approx(one, rel=1e-4)
    assert read_record(tmp_path / "one").metrics["padding"] == 0


def test_stored_features_work_with_two_processes_and_zero3(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    flags = f"{COMMON} --tune_vision false --max_steps 22"
    one = losses(uneven_shards, f"{flags} {PLAIN} --per_device_train_batch_size 4", out="one")
    cache = f"--cache_dir {tmp_path / 'cache'}"
    two = losses(uneven_shards, f"{flags} {cache} --per_device_train_batch_size 2 --strategy zero3", 2, out="two")
    assert list((tmp_path / "cache" / "features").iterdir())
    assert two == pytest.approx(one, rel=1e-3)
