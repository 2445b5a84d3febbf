"""If a process hangs, dies or runs out of memory, the error names the process, the step and the remedy."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.components.train.watchdog import FORWARD, Watchdog, find_stalled_process
from minicpmv_finetune.components.train.worker_exit import StepProgress
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.reports.training_record import read_record

FLAGS = "--use_lora true --tune_llm false --use_cpu true --per_device_train_batch_size 8 --save_strategy no"


@pytest.mark.parametrize(
    ("processes", "stalled"),
    [
        ([StepProgress(0, 7, 2, 0.1), StepProgress(1, 7, 1, 0.1)], 1),
        ([StepProgress(0, 8, 0, 0.1), StepProgress(1, 7, 3, 0.1), StepProgress(2, 8, 0, 0.1)], 1),
        ([StepProgress(0, 7, 2, 0.1), StepProgress(1, 7, 2, 60.0)], 1),
        ([StepProgress(0, 7, 1, 0.1), StepProgress(1, 7, 2, 60.0)], 1),
        ([StepProgress(0, 7, 2, 0.1), StepProgress(1, 7, 2, 0.1)], None),
        ([StepProgress(0, 7, 2, 0.1)], 0),
        ([], None),
    ],
    ids=["earlier stage", "earlier step", "frozen", "frozen but ahead", "equally far", "single process", "unknown"],
)
def test_the_stalled_process_is_found(processes: list[StepProgress], stalled: int | None) -> None:
    found = find_stalled_process(processes)
    assert (found and found.rank) == stalled


def test_the_time_limit_grows_with_slow_steps() -> None:
    watchdog = Watchdog(timeout=100, rank=0)
    watchdog.enter_stage(FORWARD)
    assert watchdog.time_limit == 80
    watchdog.longest_step = 30
    assert watchdog.time_limit == 300


@pytest.mark.parametrize(("timeout", "limit"), [(1800, 300), (100, 60), (15, 12), (36000, 6000)])
def test_waiting_for_data_has_a_shorter_limit_from_the_first_batch_on(timeout: float, limit: float) -> None:
    watchdog = Watchdog(timeout, rank=0)
    watchdog.wait_for_data(1)
    assert watchdog.time_limit == pytest.approx(limit)
    watchdog.longest_wait = limit
    assert watchdog.time_limit == pytest.approx(10 * limit)


def _training(shards: Path, base: Path, tmp_path: Path, *flags: str, restarts: str = "0") -> "subprocess.Popen[str]":
    paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(tmp_path / "out")]
    start = "import sys; from minicpmv_finetune.cli.main import main; main()"
    command = [sys.executable, "-c", start, "train", *paths, *FLAGS.split(), *flags]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": restarts}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _process_of_rank(process: "subprocess.Popen[str]", rank: int, tmp_path: Path) -> psutil.Process:
    """Wait for the second step, and return the process of that rank."""
    while process.poll() is None:
        recorded = [file.read_text().split() for file in tmp_path.glob(f"tmp*/progress-{rank}")]
        if recorded and recorded[0] and int(recorded[0][1]) >= 2:
            children = psutil.Process(process.pid).children(recursive=True)
            return next(child for child in children if child.environ().get("RANK") == str(rank))
        time.sleep(0.05)
    raise AssertionError(process.stderr and process.stderr.read())


@pytest.mark.faults_only
def test_a_frozen_process_is_named_and_the_training_ends_with_75(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    with _training(shards, tiny_46, tmp_path, "--max_steps", "10000", "--ddp_timeout", "15") as process:
        _process_of_rank(process, 1, tmp_path).send_signal(signal.SIGSTOP)
        _, log = process.communicate(timeout=300)
    assert process.returncode == 75, log
    assert "Training process 1 made no progress" in log
    assert "--ddp_timeout (now 15 s)" in log
    assert "Stacks of training process 0:" in log


@pytest.mark.faults_only
def test_a_killed_process_is_named_with_its_step(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    with _training(shards, tiny_46, tmp_path, "--max_steps", "10000") as process:
        _process_of_rank(process, 1, tmp_path).kill()
        _, log = process.communicate(timeout=300)
    assert process.returncode == 137, log
    sentence = log.strip().splitlines()[-1]
    assert sentence.startswith("error: training process 1 was killed (signal 9) in step ")
    assert "--per_device_train_batch_size" in sentence


@pytest.mark.faults_only
def test_a_killed_process_is_restarted_and_continues(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    flags = "--max_steps 20 --save_strategy steps --save_steps 1 --save_total_limit 2".split()
    with _training(shards, tiny_46, tmp_path, *flags, restarts="1") as process:
        _process_of_rank(process, 1, tmp_path).kill()
        _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "continuing from checkpoint-" in log
    steps = [entry["step"] for entry in read_record(tmp_path / "out").history if "loss" in entry]
    assert steps == sorted(set(steps))


def test_after_a_mistake_training_is_not_restarted(
    tiny_46: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")
    paths = ["--model_name_or_path", str(tiny_46), "--data_path", str(shards), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"at step [2-5]"):
        launch([*paths, *FLAGS.split(), *"--weight_decay 1e30 --max_grad_norm 0 --max_steps 50".split()], 2)
    assert capfd.readouterr().err.count("are trained on") == 1


class _Hungry(nn.Module):
    """A model that allocates more memory than there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        return {"loss": self.weight.sum() + torch.empty(2**50).sum()}


def test_running_out_of_memory_names_process_step_and_settings(make_trainer: Callable[..., MiniCPMVTrainer]) -> None:
    model = _Hungry()
    trainer = make_trainer(model, per_device_train_batch_size=4)
    batch = {"rows": [0, 1, 2, 3], "input_ids": torch.zeros(4, 3, dtype=torch.long), "target_sizes": torch.ones(5, 2)}
    with pytest.raises(
        UserError, match=r"process 0 ran out of memory at step 1, .* 4 × 3 tokens and 5 slices"
    ) as raised:
        trainer.training_step(model, batch, None)
    for setting in ("--per_device_train_batch_size (now 4)", "--max-slice-nums", "--gradient_checkpointing", "zero3"):
        assert setting in str(raised.value)
