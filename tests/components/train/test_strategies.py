from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

LORA = "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0 --learning_rate 3e-3 --save_strategy no"
FULL = "--learning_rate 1e-3 --save_strategy no"
STEPS = "--max_steps 10 --warmup_steps 2"


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_train_adapters_as_one_does(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path, strategy: str
) -> None:
    # Every other sample has no image, and the lengths differ: the loss is the mean over the tokens of all ranks, and a
    # rank with text alone must not make the other one wait.
    one = losses(uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 4", out="one")
    two = losses(uneven_shards, f"{LORA} {STEPS} --per_device_train_batch_size 2 --strategy {strategy}", 2, out="two")
    assert len(two) == 10
    assert two == pytest.approx(one, rel=1e-4)
    assert _largest_difference(tmp_path, "adapter_model.safetensors") < 1e-3


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_processes_train_the_whole_model_as_one_does(
    uneven_shards: Path, losses: Callable[..., list[float]], tmp_path: Path, strategy: str
) -> None:
    one = losses(uneven_shards, f"{FULL} {STEPS} --per_device_train_batch_size 4", out="one")
    two = losses(uneven_shards, f"{FULL} {STEPS} --per_device_train_batch_size 2 --strategy {strategy}", 2, out="two")
    assert two == pytest.approx(one, rel=1e-4)
    assert _largest_difference(tmp_path, "model.safetensors") < 1e-3


def test_accumulated_losses_are_means_over_the_tokens_of_the_whole_batch(
    uneven_shards: Path, losses: Callable[..., list[float]]
) -> None:
    at_once = losses(uneven_shards, f"{LORA} --max_steps 5 --per_device_train_batch_size 4", out="one")
    accumulated = losses(
        uneven_shards,
        f"{LORA} --max_steps 5 --per_device_train_batch_size 1 --gradient_accumulation_steps 4",
        out="two",
    )
    assert accumulated == pytest.approx(at_once, rel=1e-4)


def test_one_rank_may_have_no_image(uneven_shards: Path, losses: Callable[..., list[float]]) -> None:
    # Batches of one sample: often only one of the two ranks has an image.
    flags = f"{LORA} --max_steps 6 --per_device_train_batch_size 1"
    assert losses(uneven_shards, f"{flags} --strategy zero3", 2, out="three") == pytest.approx(
        losses(uneven_shards, f"{flags} --strategy ddp", 2, out="ddp"), rel=1e-4
    )


def _largest_difference(folder: Path, file: str) -> float:
    one, two = load_file(folder / "one" / file), load_file(folder / "two" / file)
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)
