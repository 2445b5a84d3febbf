"""Callbacks of the Trainer: progress bar, metrics for MLflow, sealed checkpoints, and an orderly end on a signal."""

import ctypes
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
from .worker_exit import signal_name

_SECONDS = "seconds"  # since the training began, in all its parts


class TrainingMonitor(TrainerCallback):
    """Draws one progress bar and sends metrics to MLflow, those of each step once, also after a resumption."""

    def __init__(self, run: StepRun, lengths: Sequence[int], unit: str = " samples") -> None:
        """Create the monitor; measuring begins with the training.

        Args:
            run: MLflow run that receives the metrics.
            lengths: Number of tokens of each training sample.
            unit: Plural name of what a batch consists of, for the bar.
        """
        self.run = run
        self.lengths = lengths
        self.unit = unit
        self.last_logged_step = run.last_step("train/loss")
        self.bar: Any = None
        self.samples = 0
        self.batches = 0
        self.shared = 0
        self.tokens = 0
        self.positions = 0
        self.seconds_waiting = 0.0
        self.started = 0.0
        self.first_step = 0
        self.seconds_before = 0.0

    def count_batch(self, rows: Sequence[int], positions: int, shared: int = 0) -> None:
        """Count a batch's samples, tokens and padding.

        Args:
            rows: Numbers of the samples in the batch.
            positions: Number of positions in the batch, padding included.
            shared: Number of the samples' tokens that the batch does not have again, because they share them.
        """
        self.samples += len(rows)
        self.batches += 1
        self.tokens += sum(self.lengths[row] for row in rows) - shared
        self.shared += shared
        self.positions += positions

    @property
    def seconds(self) -> float:
        """Seconds since the training began, by the monotonic clock."""
        return max(time.perf_counter() - self.started, 1e-9)

    def samples_per_second(self, processes: int) -> float:
        """Samples per second of all processes together; each process is assumed to have as many as this one."""
        return self.samples * processes / self.seconds

    @property
    def tokens_per_batch(self) -> float:
        """Mean number of tokens of a batch, without padding."""
        return self.tokens / max(self.batches, 1)

    @property
    def shared_share(self) -> float:
        """Share of the samples' tokens that were not computed again."""
        return self.shared / max(self.tokens + self.shared, 1)

    @property
    def waiting(self) -> float:
        """Share of the time since the training began that was spent on waiting for batches."""
        return self.seconds_waiting / self.seconds

    @property
    def padding(self) -> float:
        """Share of the positions computed so far that were padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.started = time.perf_counter()
        self.first_step = state.global_step
        self.seconds_before = next((log[_SECONDS] for log in reversed(state.log_history) if _SECONDS in log), 0.0)
        if state.is_world_process_zero:
            samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            effective = {
                "batch_size": samples,
                "steps": state.max_steps,
                "warmup_steps": args.get_warmup_steps(state.max_steps),
                "processes": args.world_size,
                "device": args.device.type,
            }
            self.run.log_parameters({f"effective/{name}": value for name, value in effective.items()})
            self.bar = progress("train", state.max_steps * samples, self.unit, initial=state.global_step * samples)
            self.bar.samples_per_step = samples

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
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
        """Send metrics; a resumed run does not send again what it sent before it was stopped."""
        if state.log_history:
            state.log_history[-1][_SECONDS] = self.seconds_before + self.seconds  # a checkpoint has it too
        if not state.is_world_process_zero or not logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        if "train_runtime" in metrics:
            metrics |= {
                "train_runtime": self.seconds,
                "train_samples_per_second": self.samples_per_second(args.world_size),
            }
            if not self.samples:  # a checkpoint was complete, and no step was left
                metrics = {name: value for name, value in metrics.items() if not name.endswith("_per_second")}
        metrics |= {"padding": self.padding, "waiting": self.waiting, "peak_memory_mb": peak_memory() / 1e6}
        if state.global_step > self.last_logged_step:
            self.run.log_metrics({f"train/{name}": value for name, value in metrics.items()}, state.global_step)
        if self.bar is not None and "loss" in metrics:
            seconds = max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, {self.tokens * args.world_size / seconds:,.0f} tok/s, "
                f"{self.padding:.0%} pad",
                refresh=False,
            )

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class CheckpointSealer(TrainerCallback):
    """Seals each checkpoint when all processes have written their part."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        """Create the callback for the checkpoints that the Trainer writes."""
        self.checkpoints = checkpoints

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        uploaded = self._gather_parts_of_other_nodes(args, state.global_step) if _is_distributed() else {}
        if state.is_world_process_zero:
            self.checkpoints.begin_sealing(state.global_step, uploaded, state.best_model_checkpoint)

    def _gather_parts_of_other_nodes(self, args: TransformersArguments, step: int) -> dict[str, str]:
        """Wait until every process has written its part, and the other nodes have uploaded theirs.

        Raises:
            RetryableError: A node's store does not answer. Every process raises the error, so that none waits for
                another.
        """
        torch.distributed.barrier()
        uploads = args.local_process_index == 0 and args.process_index != 0
        part: dict[str, str] | str = {}
        try:
            part = self.checkpoints.upload_part(step) if uploads else {}
        except RetryableError as error:
            part = str(error)
        parts: list[Any] = [None] * args.world_size
        torch.distributed.all_gather_object(parts, part)
        for failure in parts:
            if isinstance(failure, str):
                raise RetryableError(failure)
        return {file: digest for part in parts for file, digest in part.items()}


class SignalStopper(TrainerCallback):
    """On SIGTERM, Ctrl-C or a closed terminal the step is finished, a checkpoint is saved, and the training stops.

    It is saved once: a second one of the same step would replace a checkpoint that is being sealed, perhaps the only
    one. transformers does at a stop what it does at an epoch's end, so this is left out within an epoch, and the
    checkpoint of an epoch's last step comes after it, with its evaluation.

    Before the first step there is nothing to save, and the process ends at once.

    If the parent process dies without passing the signal on (Kubeflow's launcher does that), the kernel sends SIGTERM
    itself (`PR_SET_PDEATHSIG`). So no orphan process continues to train beside its successor.
    """

    def __init__(self) -> None:
        """Install the signal handlers."""
        self.stop_requested = False
        self.signal_name = "SIGTERM"
        self._training_began = self._stops = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._request_stop)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on a step is finished before the training stops."""
        self._training_began = True

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step if any process has received the signal."""
        stop = self.stop_requested
        if _is_distributed() and torch.distributed.get_world_size() > 1:
            # All processes must stop after the same step, though the signal may reach them during different ones.
            votes = torch.tensor([float(stop)], device=args.device)
            torch.distributed.all_reduce(votes)
            stop = bool(votes.item())
        if stop:
            self.stop_requested = self._stops = control.should_training_stop = True
            control.should_save = not _ends_epoch(state)

    def on_epoch_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the checkpoint of an epoch's last step; within an epoch do nothing that belongs to its end."""
        if self._stops:  # in every process, unlike a request
            control.should_save = _ends_epoch(state)
            control.should_evaluate = control.should_evaluate and _ends_epoch(state)

    def _request_stop(self, number: int, frame: object) -> None:
        if not self._training_began:
            sys.exit(128 + number)
        self.stop_requested = True
        self.signal_name = signal_name(number)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _ends_epoch(state: TrainerState) -> bool:
    """Whether the step was the last one of an epoch."""
    return float(state.epoch or 0).is_integer()


def _is_distributed() -> bool:
    return torch.distributed.is_initialized()


def peak_memory() -> int:
    """Largest number of bytes that this process has held: of GPU memory if there is a GPU, else of main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
