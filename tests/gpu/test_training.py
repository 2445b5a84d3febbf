"""Whole trainings on one GPU, each by the command's own launcher, with tiny checkpoints."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minicpmv_finetune.components.merge.merge import MergeSettings, merge
from minicpmv_finetune.data.samples import ImageRef, Sample, Turn
from minicpmv_finetune.minicpmv.answer import answer
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.tiny_checkpoint import VERSIONS

LORA = "--use_lora true --tune_llm false --tune_vision false --lora_r 8 --lora_dropout 0 --learning_rate 3e-3"
STEPS = "--max_steps 16 --save_strategy no"
IMPROVEMENTS = {
    "packing": "--packing true",
    "checkpointing": "--gradient_checkpointing true --reuse_vision_features false",
    "workers": "--dataloader_num_workers 3 --reuse_vision_features false",
    "features": "--reuse_vision_features true",
    "plain_adapters": "--fused_lora false --reuse_vision_features false",
}


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_each_faster_way_has_the_same_losses(
    version: str, train: Callable[..., list[float]], measured: Callable[..., None]
) -> None:
    flags = f"{LORA} --num_train_epochs 2 --save_strategy no --bf16 false"
    expected = train(version, f"{flags} --reuse_vision_features false", "plain")
    found = {name: _try(train, version, f"{flags} {further}", name) for name, further in IMPROVEMENTS.items()}
    measured(version=version, plain=expected, **found)
    packed = found.pop("packing")  # other batches
    assert not isinstance(packed, str), packed
    assert packed[-1] < packed[0]
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("version", ["2.6", "4.6"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_each_strategy_trains_as_ddp_does(
    version: str, kind: str, train: Callable[..., list[float]], measured: Callable[..., None], cuda_only: None
) -> None:
    flags = f"{LORA} {STEPS}" if kind == "lora" else f"--learning_rate 1e-3 {STEPS}"
    expected = train(version, flags, "ddp")
    found = {name: _try(train, version, f"{flags} --strategy {name}", name) for name in ("zero2", "zero3", "fsdp2")}
    measured(version=version, kind=kind, ddp=expected, **found)
    for losses in found.values():
        _require_near(losses, expected)


def _require_near(losses: list[float] | str, expected: list[float]) -> None:
    """Require the same mean and end in bf16; single steps, where the loss jumps, may differ more."""
    assert not isinstance(losses, str), losses
    assert mean(losses) == pytest.approx(mean(expected), rel=0.05)
    assert losses[-1] == pytest.approx(expected[-1], rel=0.05)


def _try(train: Callable[..., list[float]], *arguments: str) -> list[float] | str:
    """The losses, or how the training failed, so that one failure does not hide what comes after it."""
    try:
        return train(*arguments)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_killed_training_resumes_to_the_result_of_an_undisturbed_one(
    version: str,
    prepared: Callable[[str], tuple[Path, Path]],
    train: Callable[..., list[float]],
    tmp_path: Path,
    measured: Callable[..., None],
) -> None:
    flags = f"{LORA} --max_steps 24 --save_strategy steps --save_steps 4 --lora_dropout 0.3"
    expected = train(version, flags, "undisturbed")
    base, shards = prepared(version)
    paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(tmp_path / "killed")]
    words = [*paths, *flags.split(), "--logging_steps", "1", "--per_device_train_batch_size", "8"]
    code = f"from minicpmv_finetune.components.train.launch import launch; launch({words!r}, 1)"
    _kill_after_a_checkpoint([sys.executable, "-c", code], tmp_path / ".killed.checkpoints", tmp_path / "log")
    losses = train(version, flags, "killed")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("undisturbed", "killed"))
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    measured(version=version, largest_difference=largest, same_losses=losses == expected)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert largest < 1e-3


def _kill_after_a_checkpoint(command: list[str], checkpoints: Path, log: Path) -> None:
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
        while process.poll() is None and not any(checkpoints.glob("checkpoint-*")):
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in [*map(int, children.read_text().split()), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, log.read_text()[-2000:]


@pytest.mark.parametrize("version", ["2.6", "4.6"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bf16_ends_where_float32_ends(
    version: str, kind: str, train: Callable[..., list[float]], measured: Callable[..., None]
) -> None:
    # At this rate most updates of a bf16 weight are less than half of its last bit.
    lora = "--use_lora true --tune_llm false --tune_vision true --lora_r 8 --lora_dropout 0"
    flags = f"{lora if kind == 'lora' else ''} --learning_rate 3e-5 --save_strategy no --max_steps 30"
    ends = [mean(train(version, f"{flags} --bf16 {name}", name)[-5:]) for name in ("true", "false")]
    measured(version=version, kind=kind, bf16=ends[0], float32=ends[1])
    assert ends[0] == pytest.approx(ends[1], rel=0.03)


@pytest.mark.parametrize("version", VERSIONS)
def test_adapters_train_merge_and_answer(
    version: str,
    prepared: Callable[[str], tuple[Path, Path]],
    train: Callable[..., list[float]],
    digits: Path,
    tmp_path: Path,
    device: torch.device,
    measured: Callable[..., None],
) -> None:
    losses = train(version, f"{LORA} {STEPS}")
    base, shards = prepared(version)
    report = merge(str(base), tmp_path / "out", shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())
    assert report.parity_check is not None
    model, _ = load_model(tmp_path / "model", torch.float32)
    model.to(device)  # type: ignore[arg-type]
    encoder, samples = Encoder.from_checkpoint(tmp_path / "model"), _questions(digits)
    batched, single = (answer(model, encoder, samples, 8, batch_size=size) for size in (8, 1))
    same = sum(one.text == two.text for one, two in zip(batched, single, strict=True))
    measured(
        version=version,
        losses=losses,
        parity=report.parity_check.parity.largest_difference,
        failure=report.parity_check.failure,
        equal_answers=f"{same} of {len(samples)}",
    )
    assert report.parity_check.failure is None
    assert mean(losses[-4:]) < mean(losses[:4])
    assert same == len(samples)


def _questions(digits: Path) -> list[Sample]:
    samples = []
    for number, path in enumerate(sorted((digits / "images").glob("*.png"))[:8]):
        width, height = Image.open(path).size
        image = ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=width, height=height)
        turn = Turn(role="user", parts=(0, "Which digit is this?" + " Look well." * number))
        samples.append(Sample(id=str(number), images=(image,), turns=(turn,), source="test"))
    return samples


@pytest.mark.parametrize("version", VERSIONS)
def test_four_bit_weights_train_and_merge(
    version: str,
    prepared: Callable[[str], tuple[Path, Path]],
    train: Callable[..., list[float]],
    tmp_path: Path,
    measured: Callable[..., None],
    cuda_only: None,
) -> None:
    losses = train(version, f"{LORA} {STEPS} --q_lora true")
    base, shards = prepared(version)
    report = merge(str(base), tmp_path / "out", shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())
    assert report.parity_check is not None
    measured(version=version, losses=losses, parity=report.parity_check.parity.largest_difference)
    assert report.parity_check.failure is None
    assert mean(losses[-4:]) < mean(losses[:4])


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_liger_trains_as_without_it(
    version: str, train: Callable[..., list[float]], measured: Callable[..., None], cuda_only: None
) -> None:
    pytest.importorskip("liger_kernel")
    expected = train(version, f"{LORA} {STEPS}", "plain")
    losses = train(version, f"{LORA} {STEPS} --use_liger_kernel true", "liger")
    measured(version=version, losses=losses, plain=expected)
    _require_near(losses, expected)
