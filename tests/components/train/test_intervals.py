"""Logging and saving where the user gave no interval, with a clock that the test moves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.intervals import ChosenIntervals


class Training:
    """A training whose steps, epochs and saves take the seconds that a test says."""

    def __init__(self, given: set[str], save_seconds: float) -> None:
        self.now = 1000.0
        self.save_seconds = save_seconds
        self.callback: Any = ChosenIntervals(frozenset(given), lambda: self.now)
        self.args = SimpleNamespace(world_size=1, logging_strategy=IntervalStrategy.STEPS)
        self.state = TrainerState(max_steps=1000, is_world_process_zero=True)
        self.saved: list[float] = []
        self._save_if_wanted(self.callback.on_train_begin)

    def run(self, steps: int, seconds: float, steps_an_epoch: int = 10**9) -> None:
        for _ in range(steps):
            self.now += seconds
            self.state.global_step += 1
            self._save_if_wanted(self.callback.on_step_end)
            if self.state.global_step % steps_an_epoch == 0:
                self._save_if_wanted(self.callback.on_epoch_end)

    def _save_if_wanted(self, event: Any) -> None:
        control = TrainerControl()
        event(self.args, self.state, control)
        if control.should_save:
            self.saved.append(self.now - 1000)
            # An evaluation before the save is not part of it.
            self.now += 500
            self.callback.on_evaluate(self.args, self.state, control)
            self.now += self.save_seconds
            self.callback.on_save(self.args, self.state, control)
            self.now -= 500 + self.save_seconds
            self.callback.last_save -= 500 + self.save_seconds


def test_a_checkpoint_is_saved_every_ten_minutes_and_at_the_end_of_each_epoch() -> None:
    training = Training(set(), save_seconds=1)
    training.run(steps=100, seconds=30, steps_an_epoch=50)
    assert training.saved == [600, 1200, 1500, 2100, 2700, 3000]


def test_the_interval_grows_where_saving_would_take_more_than_5_percent(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(set(), save_seconds=60)
    training.run(steps=100, seconds=30, steps_an_epoch=25)
    assert training.saved == [600, 1740, 2880]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(part in lines[0] for part in ("A checkpoint took 60.0 s", "19 minutes", "--save_steps"))
    assert "this epoch's end has none" in lines[1]


def test_quiet_leaves_out_how_long_a_checkpoint_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.QUIET.name, "1")
    Training(set(), save_seconds=60).run(steps=100, seconds=30, steps_an_epoch=25)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["save_steps", "save_strategy"])
def test_an_interval_of_the_users_is_obeyed(given: str) -> None:
    training = Training({given}, save_seconds=1)
    training.run(steps=100, seconds=60, steps_an_epoch=10)
    assert training.saved == []


@pytest.mark.parametrize(
    ("given", "steps", "expected"), [("", 1000, 10), ("", 30, 3), ("", 4, 1), ("logging_steps", 30, 7)]
)
def test_a_short_training_has_curves_too(given: str, steps: int, expected: int) -> None:
    callback: Any = ChosenIntervals(frozenset({given}))
    state = TrainerState(max_steps=steps, logging_steps=7)
    callback.on_train_begin(SimpleNamespace(logging_strategy=IntervalStrategy.STEPS), state, TrainerControl())
    assert state.logging_steps == expected


@pytest.mark.parametrize(
    ("flags", "strategy", "save_steps", "logging_steps", "eval_steps"),
    [
        ("", SaveStrategy.NO, 500, 10, None),
        ("--save_steps 7", SaveStrategy.STEPS, 7, 10, None),
        ("--save_strategy epoch --logging_steps=3", SaveStrategy.EPOCH, 500, 3, None),
        ("--eval_strategy steps", SaveStrategy.NO, 500, 10, 500),
        ("--eval_strategy steps --load_best_model_at_end true", SaveStrategy.STEPS, 500, 10, 500),
    ],
)
def test_only_intervals_that_the_user_did_not_give_are_chosen(
    tmp_path: Path, flags: str, strategy: SaveStrategy, save_steps: int, logging_steps: int, eval_steps: int | None
) -> None:
    training = parse(["--data_path", "d", "--output_dir", str(tmp_path), *flags.split()]).training
    assert training.save_strategy == strategy
    assert (training.save_steps, training.logging_steps, training.eval_steps) == (save_steps, logging_steps, eval_steps)
