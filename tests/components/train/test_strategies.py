from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.components.train.conftest import Train

LORA = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
FULL = "--learning_rate 1e-3 --save_strategy no"
EVALUATION = "--eval_strategy steps --eval_steps 3 --per_device_eval_batch_size 1"
STEPS = "--max_steps 5 --warmup_steps 2"


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_train_adapters_as_one_does(uneven_shards: Path, train: Train, strategy: str) -> None:
    # Every other sample has no image, and the lengths differ: the loss is the mean over the tokens of all ranks, and a
    # rank with text alone must not make the other one wait.
    one = train(uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 4")
    two = train(uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 2 --strategy {strategy}", 2)
    assert len(two.losses) == 5
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert _largest_difference(one.folder, two.folder, "adapter_model.safetensors") < 1e-3


@pytest.mark.parametrize("strategy", ["zero2", "zero3", pytest.param("fsdp2", marks=pytest.mark.faults_only)])
def test_two_processes_train_the_whole_model_as_one_does(uneven_shards: Path, train: Train, strategy: str) -> None:
    one = train(uneven_shards, f"{FULL} {STEPS} --per_device_train_batch_size 4")
    two = train(uneven_shards, f"{FULL} {STEPS} --per_device_train_batch_size 2 --strategy {strategy}", 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert _largest_difference(one.folder, two.folder, "model.safetensors") < 1e-3


def test_accumulated_losses_are_means_over_the_tokens_of_the_whole_batch(uneven_shards: Path, train: Train) -> None:
    at_once = train(uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 4")
    accumulated = train(
        uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    )
    assert accumulated.losses == pytest.approx(at_once.losses, rel=1e-4)


def test_one_rank_may_have_no_image(uneven_shards: Path, train: Train) -> None:
    # Batches of one sample: often only one of the two ranks has an image, in training and evaluation.
    flags = f"{LORA} --max_steps 3 --per_device_train_batch_size 1 {EVALUATION}"
    partitioned = train(uneven_shards, f"{flags} --strategy zero3", 2)
    whole = train(uneven_shards, f"{flags} --strategy ddp", 2)
    assert partitioned.losses == pytest.approx(whole.losses, rel=1e-4)
    assert len(whole.eval_losses) == 1
    assert partitioned.eval_losses == pytest.approx(whole.eval_losses, rel=1e-4)


@pytest.mark.faults_only
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_in_bf16_end_where_one_does_in_float32(
    half_shards: Path, train: Train, strategy: str, kind: str
) -> None:
    # One update of this size is less than half of most weights' last bit in bf16; only copies in float32 add them up.
    # The computation sees them later, so losses in between differ more.
    flags = f"{LORA if kind == 'lora' else FULL} --lr_scheduler_type constant --max_steps 30 --eval_strategy steps"
    flags = flags.replace("3e-3", "1e-5").replace("1e-3", "3e-5") + " --eval_steps 30"
    # The loss of a batch, in an evaluation too, is the mean over the tokens of all processes.
    one = train(half_shards, f"{flags} --per_device_train_batch_size 4 --per_device_eval_batch_size 2")
    both = "--per_device_train_batch_size 2 --per_device_eval_batch_size 1 --bf16 true"
    two = train(half_shards, f"{flags} {both} --strategy {strategy}", 2)
    assert two.losses[-5:] == pytest.approx(one.losses[-5:], rel=0.03)
    assert two.eval_losses == pytest.approx(one.eval_losses, rel=0.03)
    expected, found = (_share_that_moved(half_shards.parent / "base", training.folder) for training in (one, two))
    assert found >= 0.95 * expected > 0.2


@pytest.mark.faults_only
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "full"), ("ddp", "lora"), ("zero3", "lora")])
def test_a_tower_that_does_not_merge_patches_is_trained(
    fine_shards: Path, train: Train, strategy: str, kind: str
) -> None:
    flags = f"{LORA if kind == 'lora' else FULL} --max_steps 4"
    one = train(fine_shards, f"{flags} --per_device_train_batch_size 4")
    two = train(fine_shards, f"{flags} --per_device_train_batch_size 2 --strategy {strategy}", 2)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    file = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert _largest_difference(one.folder, two.folder, file) < 1e-3


def _largest_difference(first: Path, second: Path, file: str) -> float:
    one, two = load_file(first / file), load_file(second / file)
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


def _share_that_moved(base: Path, folder: Path) -> float:
    """The share of the saved numbers that a training has changed in bf16; adapters begin with a B of zero."""
    start = load_file(base / "model.safetensors")
    saved = next(file for file in ("adapter_model.safetensors", "model.safetensors") if (folder / file).exists())
    moved = total = 0
    for name, weight in load_file(folder / saved).items():
        if ".lora_A." in name:
            continue
        first = start.get(name.removeprefix("base_model.model."), torch.zeros_like(weight))
        moved += int((weight.bfloat16() != first.bfloat16()).sum())
        total += weight.numel()
    return moved / total
