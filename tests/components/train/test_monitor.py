"""What the monitor of a training sends, and when a stop saves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune.components.train.callbacks import SignalStopper, TrainingMonitor


class _Run:
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def last_step(self, name: str) -> int:
        return -1

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics = metrics


@pytest.mark.parametrize("samples", [0, 3])
def test_no_speed_is_sent_where_no_step_was_left(samples: int) -> None:
    run: Any = _Run()
    monitor = TrainingMonitor(run, [5])
    monitor.count_batch([0] * samples, 5)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=2, log_history=[])
    sent_by_transformers = {"train_runtime": 1.0, "train_samples_per_second": 9.0, "train_steps_per_second": 9.0}
    arguments: Any = SimpleNamespace(world_size=1)
    monitor.on_log(arguments, state, arguments, sent_by_transformers)
    assert ("train/train_samples_per_second" in run.metrics) == bool(samples)
    assert "train/train_runtime" in run.metrics


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * values).sum()}


class _Recorder(TrainerCallback):
    def __init__(self, stopper: SignalStopper, step: int) -> None:
        self.stopper, self.step = stopper, step
        self.events: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopper.stop_requested = state.global_step + 1 == self.step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"evaluate {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"save {state.global_step}")


@pytest.mark.parametrize(
    ("step", "saves", "events"),
    [
        (1, "epoch", ["save 1"]),
        (2, "epoch", ["evaluate 2", "save 2"]),
        (3, "epoch", ["evaluate 2", "save 2", "save 3"]),
        (2, "steps", ["evaluate 2", "save 2"]),
        (1, "no", ["save 1"]),
        (2, "no", ["evaluate 2", "save 2"]),
        (9, "epoch", ["evaluate 2", "save 2", "evaluate 4", "save 4"]),
    ],
)
def test_a_stop_saves_once_and_the_last_step_of_an_epoch_after_its_evaluation(
    step: int, saves: str, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(prctl=lambda *arguments: None))
    stopper = SignalStopper()
    recorder = _Recorder(stopper, step)
    arguments = TransformersArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy=saves,
        save_steps=2,
        eval_strategy="epoch",
        num_train_epochs=2,
        per_device_train_batch_size=1,
        prediction_loss_only=True,
    )
    data: Any = [{"values": torch.ones(1)}] * 2
    Trainer(_Sum(), arguments, train_dataset=data, eval_dataset=data, callbacks=[recorder, stopper]).train()
    assert recorder.events == events
