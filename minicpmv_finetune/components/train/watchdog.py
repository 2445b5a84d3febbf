"""Ends a training that stands still, says which process the others waited for, and shows where it stood.

A process that hangs (a stuck disk, a frozen container, a deadlock) leaves the others waiting in a collective, and what
they report after their timeout is that they waited. So each process notes how far it is in a file beside the others',
and a thread looks at them: it works while the main thread does not. Slow steps are no hang: the patience grows with the
longest step seen.
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

from .worker_exit import Place, ending_folder, note_place, read_places

STAGES = ("waiting for data", "in its forward pass", "in its backward pass", "after its step")
# Before torch's own --ddp_timeout ends whoever waits in a collective, with a sentence that only says it waited.
_OF_THE_TIMEOUT = 0.8
_TIMES_THE_LONGEST_STEP = 10
_NOTED_EVERY = 5.0  # seconds, or more often where patience is short


class Watchdog(TrainerCallback):
    """Watches this process from the first step to the last."""

    def __init__(self, timeout: float, rank: int) -> None:
        """The timeout is torch's own, in seconds; the rank is counted over all nodes."""
        self.timeout = timeout
        self.rank = rank
        self.step, self.stage = 0, 0
        self.moved = self.step_began = time.monotonic()
        self.longest_step = 0.0
        self.over = threading.Event()

    @property
    def patience(self) -> float:
        """Seconds without a move that are taken for standing still."""
        return max(_OF_THE_TIMEOUT * self.timeout, _TIMES_THE_LONGEST_STEP * self.longest_step)

    def reached(self, stage: int) -> None:
        """Note that this process got on."""
        self.stage, self.moved = stage, time.monotonic()

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to watch."""
        self.step = state.global_step + 1
        self.reached(0)
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step's data is there."""
        self.step, self.step_began = state.global_step + 1, time.monotonic()
        self.reached(1)
        self._note()

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn how long steps take."""
        self.longest_step = max(self.longest_step, time.monotonic() - self.step_began)
        self.reached(3)

    def on_prediction_step(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation gets on too."""
        self.reached(3)

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """So does saving."""
        self.reached(3)

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(min(self.patience / 10, _NOTED_EVERY)):
            self._note()
            waited = time.monotonic() - self.moved
            if waited > self.patience:
                self._end(waited)

    def _note(self) -> None:
        note_place(self._place())

    def _place(self) -> Place:
        return Place(self.rank, self.step, self.stage)

    def _end(self, waited: float) -> NoReturn:
        folder = ending_folder()
        behind = whom_the_others_wait_for(read_places(folder) if folder else []) or self._place()
        sentence = (
            f"Training process {behind.rank} stood still {STAGES[behind.stage]}, step {behind.step}, for {waited:.0f} "
            "s; above is where each process stood; another try goes on from the newest checkpoint, and if steps are as "
            f"slow as that, raise --ddp_timeout (now {self.timeout:.0f} s)."
        )
        print(f"Where training process {self.rank} stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if behind.rank != self.rank and behind.seen <= 2 * _NOTED_EVERY:
            # The first to end takes the others with it; who hangs shall show its stacks before.
            time.sleep(5)
        if folder:
            (folder / "sentence").write_text(sentence)
        else:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(RETRY_EXIT)


def whom_the_others_wait_for(places: Iterable[Place]) -> Place | None:
    """The process that froze, or else the one least far; None where several are equally far."""
    known = sorted(places, key=lambda place: (place.step, place.stage))
    if not known:
        return None
    frozen = max(known, key=lambda place: place.seen)
    if frozen.seen > 2 * _NOTED_EVERY:
        return frozen
    first = known[0]
    alone = len(known) == 1 or (first.step, first.stage) < (known[1].step, known[1].stage)
    return first if alone else None
