"""Trainings with and without what makes them faster lose alike, step by step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.reports.training_record import read_record

COMMON = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
PLAIN = "--supervised_logits_only false --reuse_vision_features false"
FROZEN = f"{COMMON} --tune_vision false --num_train_epochs 2 --per_device_train_batch_size 8 --eval_strategy epoch"


def test_stored_features_and_short_logits_lose_as_the_plain_path(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    plain = losses(uneven_shards, f"{FROZEN} {PLAIN}", out="plain")
    fast = losses(uneven_shards, f"{FROZEN} --cache_dir {tmp_path / 'cache'}", out="fast")
    assert list((tmp_path / "cache" / "features").iterdir())
    assert fast == pytest.approx(plain, rel=1e-4)
    evaluated = [
        [entry for entry in read_record(tmp_path / name).history if "eval_loss" in entry] for name in ("plain", "fast")
    ]
    for one, two in zip(*evaluated, strict=True):
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
        assert two["eval_token_accuracy"] == pytest.approx(one["eval_token_accuracy"], abs=0.02)


def test_packs_train_two_processes_as_one(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    flags = f"{COMMON} --packing true --model_max_length 128 --max_steps 4"
    one = losses(uneven_shards, f"{flags} --per_device_train_batch_size 2", out="one")
    two = losses(uneven_shards, f"{flags} --per_device_train_batch_size 1", 2, out="two")
    assert two == pytest.approx(one, rel=1e-4)
    assert read_record(tmp_path / "one").metrics["padding"] == 0


def test_stored_features_serve_processes_under_zero3(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    flags = f"{COMMON} --tune_vision false --max_steps 22"
    one = losses(uneven_shards, f"{flags} {PLAIN} --per_device_train_batch_size 4", out="one")
    cache = f"--cache_dir {tmp_path / 'cache'}"
    two = losses(uneven_shards, f"{flags} {cache} --per_device_train_batch_size 2 --strategy zero3", 2, out="two")
    assert list((tmp_path / "cache" / "features").iterdir())
    assert two == pytest.approx(one, rel=1e-3)


def test_batches_of_like_length_pad_less(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path
) -> None:
    flags = f"{COMMON} --num_train_epochs 1 --per_device_train_batch_size 2"
    losses(uneven_shards, flags, out="random")
    losses(uneven_shards, f"{flags} --group_by_length true", out="grouped")
    padding = {name: read_record(tmp_path / name).metrics["padding"] for name in ("random", "grouped")}
    assert padding["grouped"] < padding["random"]


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("version", ["2.6", "4.6", "4.7"])
def test_training_keeps_no_keys_and_values(
    version: str, short: bool, tiny: Callable[[str], Path], trainer_of: Callable[..., MiniCPMVTrainer]
) -> None:
    model, generation = load_model(tiny(version), torch.float32)
    assert model.config.get_text_config().use_cache
    trainer = trainer_of(model, supervised_logits_only=short)
    kept = []
    model.get_submodule(generation.language_model).register_forward_hook(
        lambda _, given, made: kept.append(made.past_key_values)
    )
    ids = torch.arange(20, 28).unsqueeze(0)
    trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}).backward()
    assert kept == [None]
