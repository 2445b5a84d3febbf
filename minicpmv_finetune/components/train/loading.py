"""Data loaders whose workers hand over every batch, or the reason why they cannot, and never outlive their training.

torch alone loses three things. An error with a sentence arrives as a traceback in one line; therefore it travels as an
item. A batch that does not fit into shared memory is dropped by a thread of the worker while the trainer waits for it
forever; therefore a worker puts it there itself, and before the first step the trainer checks that there is room. And
workers that survive SIGTERM would keep their trainer from ending; therefore it kills them.
"""

import heapq
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, get_worker_info

from minicpmv_finetune.cpu_memory import keep_freed_memory
from minicpmv_finetune.errors import RetryableError, UserError, explain_disk_errors, first_line
from minicpmv_finetune.workers import KEPT_MEMORY, SHARED_MEMORY, end_with_parent

_ERROR = "error"  # key of a batch that is an error
_LONGEST_SOCKET_PATH = 103  # bytes; of Linux 107, of macOS 103
_DEFAULT_PREFETCH = 2  # batches per worker, by torch's default
SECONDS_FOR_A_BATCH = 300
"""How long a loader may wait for a batch, where no watchdog watches."""


class SizedDataset(Protocol):
    """A dataset that knows the lengths of its items before it reads them."""

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each item."""

    def __getitem__(self, position: int) -> Any: ...


@dataclass(frozen=True)
class Explained(Dataset[Any]):
    """A dataset whose errors with a sentence are items.

    Attributes:
        dataset: The dataset itself.
    """

    dataset: Dataset[Any]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Any:
        try:
            with explain_disk_errors():
                return self.dataset[position]
        except (UserError, RetryableError) as error:
            return error


@dataclass(frozen=True)
class HandOver:
    """Collates items, and lets a worker put the batch into shared memory while an error can still be reported.

    Attributes:
        collate: Makes a batch of items.
    """

    collate: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """Make a batch; a batch with the key `error` if an item is an error or there is no room."""
        for item in items:
            if isinstance(item, UserError | RetryableError):
                return {_ERROR: item}
        batch = self.collate(items)
        if get_worker_info() is not None:
            try:
                for tensor in _tensors(batch):
                    tensor.share_memory_()
            except (OSError, RuntimeError) as error:
                return {_ERROR: _no_shared_memory(error)}
        return batch


def unless_error(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch itself.

    Raises:
        UserError: The batch is such an error.
        RetryableError: The batch is such an error.
    """
    if _ERROR in batch:
        raise batch[_ERROR]
    return batch


def start_worker(worker_id: int) -> None:
    """Let a worker survive the signals that stop a training, but not its trainer, and keep memory for its next images.

    torchrun sends SIGTERM to all of a training's processes, and the step that is being finished may still need batches.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory(KEPT_MEMORY)


def use_short_socket_paths() -> None:
    """Let workers hand over their batches where the folder for temporary files has a long path.

    They pass file descriptors through a Unix socket in that folder. Where its path exceeds what the system allows, a
    thread of the worker drops the batch, and the trainer waits for it.
    """
    path = Path(tempfile.gettempdir()) / "pymp-12345678" / "listener-12345678"  # as multiprocessing names it
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH or not Path(SHARED_MEMORY).is_dir():
        return
    before, tempfile.tempdir = tempfile.tempdir, SHARED_MEMORY
    try:
        multiprocessing.util.get_temp_dir()  # which is kept, and inherited by workers
    finally:
        tempfile.tempdir = before


def end_workers() -> None:
    """Kill all workers; Python itself would send them SIGTERM, and then wait for them without a limit."""
    # torch's handler would report them as workers that failed.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def describe_worker_failure(error: BaseException | None) -> str:
    """A sentence if a worker's end, or its silence, caused this error; otherwise empty. torch's error has no class."""
    while error is not None:
        text = str(error)
        if "DataLoader worker" in text and "Bus error" in text:
            return f"A worker of the data loader found no room in {SHARED_MEMORY}; {_REMEDIES}."
        if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
            return (
                "A worker of the data loader was killed, as Linux does when memory runs out; give the pod more memory, "
                "or lower --dataloader_num_workers or --per_device_train_batch_size."
            )
        if "DataLoader timed out" in text:
            return (
                f"The workers of the data loader made no batch for {SECONDS_FOR_A_BATCH} s; check that the disk "
                "answers, or train with --dataloader_num_workers 0."
            )
        error = error.__cause__ or error.__context__
    return ""


@dataclass(frozen=True)
class LoaderPlan:
    """A data loader that is going to be used.

    Attributes:
        dataset: Its dataset.
        batch_size: Number of items in a batch.
        collate: Makes a batch.
    """

    dataset: SizedDataset
    batch_size: int
    collate: Callable[[Sequence[Any]], Mapping[str, Any]]

    def bytes(self, batches: int) -> int:
        """An upper bound of the size of some batches: those of the longest items, in proportion to their lengths."""
        lengths = self.dataset.lengths
        longest = heapq.nlargest(batches * self.batch_size, range(len(lengths)), lengths.__getitem__)
        first = longest[: self.batch_size]
        size = sum(tensor.nbytes for tensor in _tensors(self.collate([self.dataset[position] for position in first])))
        return int(size * sum(lengths[i] for i in longest) / max(sum(lengths[i] for i in first), 1))


def check_shared_memory(plans: Iterable[LoaderPlan], workers: int, prefetch: int | None, processes: int) -> None:
    """Check that workers can hand over batches, and that those of the given loaders have room in shared memory.

    Args:
        plans: The loaders.
        workers: Number of each loader's workers.
        prefetch: Number of batches that each worker prepares; None means torch's default.
        processes: Number of training processes on this machine.

    Raises:
        UserError: There is no shared memory, or too little.
    """
    try:
        multiprocessing.Lock()
        torch.zeros(1).share_memory_()
        disk = os.statvfs(SHARED_MEMORY)
    except (OSError, RuntimeError) as error:
        raise _no_shared_memory(error) from error
    batches = workers * (prefetch or _DEFAULT_PREFETCH)
    needed = processes * sum(plan.bytes(batches) for plan in plans)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:
        raise UserError(
            f"{SHARED_MEMORY}: {free / 1e6:,.1f} MB are free, but the batches that the data loader prepares with "
            f"--dataloader_num_workers {workers} may need {needed / 1e6:,.1f} MB; {_REMEDIES}."
        )


_REMEDIES = (
    f"enlarge {SHARED_MEMORY} (`shared_memory` in a profile), or lower --dataloader_num_workers (0 needs none), "
    "--dataloader_prefetch_factor or --per_device_train_batch_size"
)


def _no_shared_memory(error: Exception) -> UserError:
    reason = first_line(error)
    remedy = "raise the limit of open files (`ulimit -n`), or lower --dataloader_num_workers"
    return UserError(
        f"{SHARED_MEMORY}: a worker of the data loader cannot hand over a batch ({reason}); "
        f"{remedy if 'Too many open files' in reason else _REMEDIES}."
    )


def _tensors(batch: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, torch.Tensor))
