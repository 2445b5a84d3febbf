"""What happens around the Trainer's steps: the bar, the curves, MLflow, seals, and an orderly stop on SIGTERM."""

import ctypes
import math
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune.errors import RetryableError
from minicpmv_finetune.progress import progress
from minicpmv_finetune.tracking.step_runs import StepRun

from .checkpoints import Checkpoints


class Watcher(TrainerCallback):
    """Shows one progress bar and sends the curves to MLflow, each step once, also after a resume."""

    def __init__(self, run: StepRun, lengths: Sequence[int], unit: str = " samples") -> None:
        """The lengths are those of the training rows, in tokens; the unit is what a batch is counted in."""
        self.run = run
        self.lengths = lengths
        self.unit = unit
        self.logged_until = run.last_step("train/loss")
        self.loss = float("nan")
        self.bar: Any = None
        self.samples = 0
        self.tokens = 0
        self.padded = 0
        self.waited = 0.0
        self.started = 0.0

    def count(self, rows: Sequence[int], positions: int) -> None:
        """Take note of the rows of a batch and of its positions, for tokens and the share of padding."""
        self.samples += len(rows)
        self.tokens += sum(self.lengths[row] for row in rows)
        self.padded += positions

    @property
    def seconds(self) -> float:
        """Since training began, by a clock that nobody sets."""
        return max(time.perf_counter() - self.started, 1e-9)

    def samples_per_second(self, processes: int) -> float:
        """Of all processes together, each of which counts about as many."""
        return self.samples * processes / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the time since training began that went by waiting for batches."""
        return self.waited / self.seconds

    @property
    def padding(self) -> float:
        """Share of the positions computed so far that held no token."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.bar = progress("train", state.max_steps * samples, self.unit, initial=state.global_step * samples)
            self.bar.samples_per_step = samples

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.samples_per_step)

    def on_log(
        self,
        args: TransformersArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send the figures; a resumed run does not send again what it sent before it was stopped."""
        if not state.is_world_process_zero or not logs:
            return
        figures = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        # A training of fewer steps than --logging_steps tells its mean alone.
        logged = figures.get("train_loss", self.loss) if math.isnan(self.loss) else self.loss
        self.loss = figures.get("loss", logged)
        if "train_runtime" in figures:
            speed = self.samples_per_second(args.world_size)
            figures |= {"train_runtime": self.seconds, "train_samples_per_second": speed}
        figures |= {"padding": self.padding, "waiting": self.waiting, "peak_memory_mb": peak_memory() / 1e6}
        if state.global_step > self.logged_until:
            self.run.log_metrics({f"train/{name}": value for name, value in figures.items()}, state.global_step)
        if self.bar is not None and "loss" in figures:
            seconds = max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(
                f"loss {figures['loss']:.4f}, {self.tokens * args.world_size / seconds:,.0f} tok/s, "
                f"{self.padding:.0%} pad",
                refresh=False,
            )

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class Sealer(TrainerCallback):
    """Seals each checkpoint when all processes have written their part."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        """The checkpoints are those the Trainer writes."""
        self.checkpoints = checkpoints

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal what was just written."""
        elsewhere = self._parts_of_other_nodes(args, state.global_step) if torch.distributed.is_initialized() else {}
        if state.is_world_process_zero:
            self.checkpoints.seal(state.global_step, elsewhere)

    def _parts_of_other_nodes(self, args: TransformersArguments, step: int) -> dict[str, str]:
        """Wait until every process has written, and those on other nodes have uploaded, their part.

        Raises:
            RetryableError: a node's store does not answer; every process raises it, so that none waits for another.
        """
        torch.distributed.barrier()
        is_elsewhere = args.local_process_index == 0 and args.process_index != 0
        part: dict[str, str] | str = {}
        try:
            part = self.checkpoints.upload_part(step) if is_elsewhere else {}
        except RetryableError as error:
            part = str(error)
        parts: list[Any] = [None] * args.world_size
        torch.distributed.all_gather_object(parts, part)
        for failure in parts:
            if isinstance(failure, str):
                raise RetryableError(failure)
        return {file: digest for part in parts for file, digest in part.items()}


class Stopper(TrainerCallback):
    """Turns SIGTERM into: finish the step, save, stop.

    A parent that dies without passing the signal on (Kubeflow's launcher does) is noticed too: the kernel then sends
    SIGTERM itself (`PR_SET_PDEATHSIG`), so no orphan goes on training beside its successor.
    """

    def __init__(self) -> None:
        """Listens from now on."""
        self.told = False
        signal.signal(signal.SIGTERM, self._listen)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, if any process was told to."""
        told = self.told
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # All must take the same step last, though the signal may reach them during different ones.
            votes = torch.tensor([float(told)], device=args.device)
            torch.distributed.all_reduce(votes)
            told = bool(votes.item())
        if told:
            self.told = control.should_save = control.should_training_stop = True

    def _listen(self, number: int, frame: object) -> None:
        self.told = True


def leave_stopping_to_trainer(worker: int) -> None:
    """Make a loader's worker outlive SIGTERM, which torchrun sends to all of a training's processes.

    The step that is being finished may still want its batches; workers end when their trainer does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def peak_memory() -> int:
    """Most bytes this process has held: of GPU memory where there is one, else of main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
