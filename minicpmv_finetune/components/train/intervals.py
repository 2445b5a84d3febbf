"""How often a training logs and saves where the user gave no interval.

A metric is logged every ten steps, in a short training more often, so that every report has its curves. A checkpoint is
saved at the end of each epoch and at least every ten minutes, so that a stop costs ten minutes at most. Saving may take
5 % of the training's time; where a checkpoint is large and a disk slow, the interval grows, and the log says so.
"""

import time
from collections.abc import Callable, Set
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as TransformersArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from minicpmv_finetune import environment
from minicpmv_finetune.terminal import print_sentence

LOGGING_STEPS = 10
_SAVE_SECONDS = 600.0
_MAX_SHARE_OF_TIME = 0.05


def choose_intervals(training: TransformersArguments, given: Set[str]) -> None:
    """Choose the intervals that the user did not give.

    Args:
        training: Parsed flags, which are changed.
        given: Names of the flags that the user gave.
    """
    if "logging_steps" not in given:
        # Not the default of the flag itself, because transformers also takes that one for eval_steps.
        training.logging_steps = LOGGING_STEPS
    if saves_by_time(given) and not training.load_best_model_at_end:
        # The callback decides when. To find the best checkpoint, however, transformers needs one at each evaluation.
        training.save_strategy = SaveStrategy.NO


def saves_by_time(given: Set[str]) -> bool:
    """Whether the user left it to this program when checkpoints are saved."""
    return not given & {"save_strategy", "save_steps"}


class ChosenIntervals(TrainerCallback):
    """Logs and saves where the user gave no interval; must be called after every callback that works on a save."""

    def __init__(self, given: Set[str], clock: Callable[[], float] = time.monotonic) -> None:
        """Create the callback.

        Args:
            given: Names of the flags that the user gave.
            clock: Returns seconds.
        """
        self.given = given
        self.saves = saves_by_time(given)
        self.clock = clock
        self.save_seconds = 0.0
        self.save_began = self.last_save = clock()
        self.saved_step = -1
        self.has_reported_epoch = False

    @property
    def seconds_between(self) -> float:
        """Seconds of training that must pass between two checkpoints so that saving takes its share of the time."""
        return self.save_seconds * (1 / _MAX_SHARE_OF_TIME - 1)

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure, and log a short training more often."""
        self.last_save = self.clock()
        if "logging_steps" not in self.given and args.logging_strategy == IntervalStrategy.STEPS:
            state.logging_steps = max(min(LOGGING_STEPS, state.max_steps // LOGGING_STEPS), 1)

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save if the last checkpoint is too old."""
        if self.saves:
            self._decide(args, state, control, max(_SAVE_SECONDS, self.seconds_between))

    def on_epoch_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, unless that would take too much of the time."""
        if not self.saves or state.global_step == self.saved_step:
            return
        self._decide(args, state, control, self.seconds_between)
        if not control.should_save and not self.has_reported_epoch:
            self.has_reported_epoch = True
            self._report(state, "this epoch's end has none")

    def on_log(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do not count the time for logging as time for saving."""
        self.save_began = self.clock()

    def on_evaluate(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do not count the time for evaluating as time for saving."""
        self.save_began = self.clock()

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure how long the checkpoint took, whoever asked for it."""
        was_short = self.seconds_between <= _SAVE_SECONDS
        self.last_save = self.clock()
        self.save_seconds = self.last_save - self.save_began
        self.saved_step = state.global_step
        if self.saves and was_short and self.seconds_between > _SAVE_SECONDS:
            self._report(state, f"the next one comes after {self.seconds_between / 60:.0f} minutes")

    def _decide(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, interval: float
    ) -> None:
        """Save if so many seconds have passed since the last checkpoint."""
        self.save_began = self.clock()
        if _of_first_process(self.save_began - self.last_save >= interval, args):
            control.should_save = True

    def _report(self, state: TrainerState, consequence: str) -> None:
        if state.is_world_process_zero and not environment.QUIET.read():
            print_sentence(
                f"A checkpoint took {self.save_seconds:.1f} s, and saving takes at most {_MAX_SHARE_OF_TIME:.0%} of "
                f"the time, so {consequence}; --save_steps sets an interval of your own.",
            )


def _of_first_process(decision: bool, args: TransformersArguments) -> bool:
    """The first process's decision: clocks differ, and a checkpoint needs all processes at the same step."""
    if args.world_size == 1:
        return decision
    shared = torch.tensor([float(decision)], device=args.device)
    torch.distributed.broadcast(shared, src=0)
    return bool(shared.item())
