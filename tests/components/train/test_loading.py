"""A data loader hands over a batch or a sentence, and its workers can be ended at any moment."""

import gc
import multiprocessing
import os
import platform
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from minicpmv_finetune.components.train import loading
from minicpmv_finetune.components.train.loading import (
    Explained,
    HandOver,
    LoaderPlan,
    check_shared_memory,
    describe_worker_failure,
    end_workers,
    start_worker,
    unless_error,
    use_short_socket_paths,
)
from minicpmv_finetune.errors import RetryableError, UserError


@dataclass(frozen=True)
class Rows(Dataset[int]):
    """Eight rows, of which one calls a function."""

    at_five: Callable[[], object] = int

    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> int:
        if position == 5:
            self.at_five()
        return position


def _collate(items: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(items), "rows": list(items)}


class _NewPages(Dataset[int]):
    """How many new pages a large array needs after others have been freed."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(40 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _loader(dataset: Dataset[int], workers: int) -> DataLoader[Any]:
    return DataLoader(
        Explained(dataset),
        batch_size=2,
        num_workers=workers,
        collate_fn=HandOver(_collate),
        worker_init_fn=start_worker if workers else None,
    )


def _raise(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such setting")
def test_a_worker_uses_the_memory_of_an_image_for_the_next_one() -> None:
    pages = [number for batch in _loader(_NewPages(), workers=1) for number in batch["rows"]]
    assert max(pages[1:]) < 20 * 2**20 / resource.getpagesize()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (UserError("row 5: is damaged."), UserError, r"^row 5: is damaged\.$"),
        (RetryableError("s3://b/k: slow down."), RetryableError, r"^s3://b/k: slow down\.$"),
        (
            OSError(28, "No space left on device", "/cache/f"),
            RetryableError,
            r"^/cache/f: no space is left on the disk",
        ),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_an_error_arrives_as_it_is(workers: int, error: Exception, kind: type[Exception], sentence: str) -> None:
    batches = map(unless_error, _loader(Rows(_raise(error)), workers))
    assert next(batches)["rows"] == [0, 1]
    with pytest.raises(kind, match=sentence):
        list(batches)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("unable to open shared memory object </torch_1> in read-write mode: Read-only file system (30)", "profile"),
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "profile"),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", "ulimit -n"),
    ],
)
def test_a_worker_that_cannot_hand_over_its_batch_says_so(
    reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: _raise(RuntimeError(reason))())
    with pytest.raises(UserError) as raised:
        list(map(unless_error, _loader(Rows(), 1)))
    assert str(raised.value).startswith("/dev/shm: a worker of the data loader cannot hand over a batch (unable to ")
    assert remedy in str(raised.value)


@pytest.fixture
def child_handler() -> Iterator[None]:
    """Takes torch's handler away, which raises where a test kills workers, and restores it when they are forgotten."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    gc.collect()
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("child_handler")
def test_workers_are_ended_in_the_middle_of_a_row() -> None:
    others = psutil.Process().children()  # servers that other tests use
    batches = iter(_loader(Rows(lambda: time.sleep(3600)), 2))
    assert [next(batches)["rows"], next(batches)["rows"]] == [[0, 1], [2, 3]], "both workers have begun"
    workers = [process for process in psutil.Process().children() if process not in others]
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGINT)
    assert not psutil.wait_procs(workers, timeout=0.5)[0], "the workers survive signals"
    end_workers()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive


@pytest.mark.usefixtures("child_handler")
def test_workers_end_with_a_killed_trainer() -> None:
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        try:
            batches = iter(_loader(Rows(lambda: time.sleep(3600)), 2))
            next(batches)
            os.write(writer, b"ready")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(reader, 5)
    workers = psutil.Process(trainer).children()
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive


@dataclass(frozen=True)
class Sized:
    """Items of known lengths."""

    lengths: Sequence[int]

    def __getitem__(self, position: int) -> int:
        return self.lengths[position]


def _bytes(items: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": [torch.zeros(sum(items), dtype=torch.uint8)], "rows": [0]}


def test_the_longest_items_determine_the_size_of_batches() -> None:
    plan = LoaderPlan(Sized([10, 400, 20, 300, 30]), 2, _bytes)
    assert plan.bytes(batches=1) == 700
    assert plan.bytes(batches=2) == 750
    assert plan.bytes(batches=9) == 760


@pytest.mark.parametrize(("free", "fits"), [(1520, True), (1519, False)])
def test_too_little_shared_memory_is_noticed_before_the_first_batch(
    free: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = os.statvfs_result((1, 1, 2000, free, free, 0, 0, 0, 0, 0))
    monkeypatch.setattr(loading.os, "statvfs", lambda path: size)
    plans = [LoaderPlan(Sized([10, 400, 20, 300, 30]), 2, _bytes)]
    if fits:
        check_shared_memory(plans, workers=2, prefetch=None, processes=2)
        return
    with pytest.raises(UserError, match=r"^/dev/shm: 0\.0 MB are free, .*num_workers 2 .*`shared_memory` in a pro"):
        check_shared_memory(plans, workers=2, prefetch=None, processes=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "was killed"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "was killed"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "no room in /dev/shm"),
        ("DataLoader timed out after 300 seconds", "made no batch for 300 s"),
        ("Caught ValueError in DataLoader worker process 0.", ""),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_the_end_of_a_worker_is_distinguished_from_other_errors(text: str, sentence: str) -> None:
    try:
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            raise KeyError("later") from error
    except KeyError as error:
        described = describe_worker_failure(error)
    assert bool(described) == bool(sentence)
    assert sentence in described


def test_a_batch_arrives_although_the_folder_for_temporary_files_has_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    process: Any = multiprocessing.current_process()
    monkeypatch.setitem(process._config, "tempdir", None)
    use_short_socket_paths()
    (batch,) = DataLoader([torch.zeros(3)], num_workers=1, timeout=30)  # type: ignore[arg-type]
    assert batch.shape == (1, 3)
    assert tempfile.gettempdir() == str(long)
