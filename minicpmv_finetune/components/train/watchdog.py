"""Ends a training that makes no progress, and reports which process the others waited for and where it was.

If a process hangs (a stuck disk, a frozen container, a deadlock), the other processes wait in a collective operation,
and after their timeout they report only that they waited. Therefore each process records its step and stage in a file
beside those of the others, and a thread reads these files; the thread runs while the main thread is blocked. Slow
steps are no hang: the time limit grows with the longest step, and the longest wait for data, so far.

A process that waits for data waits for this machine alone, so its time limit is shorter, also before the first step.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune.errors import RETRY_EXIT
from minicpmv_finetune.terminal import print_sentence

from .worker_exit import StepProgress, exit_folder, read_progress, record_exit, write_progress

WAITING_FOR_DATA, FORWARD, BACKWARD, STEP_DONE = range(4)
STAGES = ("waiting for data", "in its forward pass", "in its backward pass", "after its step")
# The limit is below torch's own --ddp_timeout, which would end the waiting processes and only report that they waited.
_SHARE_OF_TIMEOUT = 0.8
_SHARE_FOR_DATA, _MIN_SECONDS_FOR_DATA = 1 / 6, 60.0  # 300 s of the usual 1,800 s
_LONGEST_STEP_FACTOR = 10
_WRITE_INTERVAL = 5.0  # seconds; shorter if the time limit is short


class Watchdog(TrainerCallback):
    """Watches this process from the first step to the last."""

    def __init__(self, timeout: float, rank: int) -> None:
        """Create the watchdog; watching begins with the training.

        Args:
            timeout: torch's own timeout of collective operations, in seconds.
            rank: Rank of this process among the processes of all nodes.
        """
        self.timeout = timeout
        self.rank = rank
        self.step, self.stage = 0, WAITING_FOR_DATA
        self.last_progress = self.step_began = time.monotonic()
        self.longest_step = self.longest_wait = 0.0
        self.training_ended = threading.Event()

    @property
    def time_limit(self) -> float:
        """Seconds without progress after which the training is ended."""
        limit = _SHARE_OF_TIMEOUT * self.timeout
        if self.stage == WAITING_FOR_DATA:
            limit = min(limit, max(_SHARE_FOR_DATA * self.timeout, _MIN_SECONDS_FOR_DATA))
        return max(limit, _LONGEST_STEP_FACTOR * max(self.longest_step, self.longest_wait))

    def enter_stage(self, stage: int) -> None:
        """Record that this process made progress."""
        self.stage, self.last_progress = stage, time.monotonic()

    def wait_for_data(self, step: int) -> None:
        """Record that this process waits for the batches of a step."""
        self.step = step
        self.enter_stage(WAITING_FOR_DATA)

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to watch."""
        self.wait_for_data(state.global_step + 1)
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record that a step's data has arrived."""
        self.step, self.step_began = state.global_step + 1, time.monotonic()
        if self.stage == WAITING_FOR_DATA:
            self.longest_wait = max(self.longest_wait, self.step_began - self.last_progress)
        self.enter_stage(FORWARD)
        write_progress(self._progress())

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure how long the step took."""
        self.longest_step = max(self.longest_step, time.monotonic() - self.step_began)
        self.enter_stage(STEP_DONE)

    def on_prediction_step(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step of an evaluation as progress."""
        self.enter_stage(STEP_DONE)

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a saved checkpoint as progress."""
        self.enter_stage(STEP_DONE)

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self.training_ended.set()

    def _watch(self) -> None:
        while not self.training_ended.wait(min(self.time_limit / 10, _WRITE_INTERVAL)):
            write_progress(self._progress())
            waited = time.monotonic() - self.last_progress
            if waited > self.time_limit:
                self._end_process(waited)

    def _progress(self) -> StepProgress:
        return StepProgress(self.rank, self.step, self.stage)

    def _end_process(self, waited: float) -> NoReturn:
        folder = exit_folder()
        stalled = find_stalled_process(read_progress(folder) if folder else []) or self._progress()
        sentence = (
            f"Training process {stalled.rank} made no progress for {waited:.0f} s {STAGES[stalled.stage]}, step "
            f"{stalled.step}; the log above shows the stacks of the processes; another attempt continues from the "
            f"newest checkpoint; if steps do take that long, raise --ddp_timeout (now {self.timeout:.0f} s)."
        )
        print(f"Stacks of training process {self.rank}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if stalled.rank != self.rank and stalled.age <= 2 * _WRITE_INTERVAL:
            # torchrun ends all processes when the first one ends; the stalled one prints its stacks before that.
            time.sleep(5)
        # A process that did not even finish one step would hang again.
        if not record_exit(RETRY_EXIT, sentence, restart=bool(self.longest_step)):
            print_sentence(f"error: {sentence}")
        os._exit(RETRY_EXIT)


def find_stalled_process(processes: Iterable[StepProgress]) -> StepProgress | None:
    """Find the process that the others wait for.

    Returns:
        The process that is frozen, or otherwise the one that is least far; None if several are equally far.
    """
    ordered = sorted(processes, key=lambda process: (process.step, process.stage))
    if not ordered:
        return None
    oldest = max(ordered, key=lambda process: process.age)
    if oldest.age > 2 * _WRITE_INTERVAL:
        return oldest
    first = ordered[0]
    is_last_alone = len(ordered) == 1 or (first.step, first.stage) < (ordered[1].step, ordered[1].stage)
    return first if is_last_alone else None
