"""What the monitor of a training sends."""

from types import SimpleNamespace
from typing import Any

import pytest

from minicpmv_finetune.components.train.callbacks import TrainingMonitor


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
