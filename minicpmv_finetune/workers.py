"""Worker processes of a step.

A forked worker starts in milliseconds and shares the memory of everything that is imported and loaded. The price:
forking must happen before the process has threads, so all workers of a pool start with its first task.

No process waits for another one forever. A worker ends when its parent ends, even if the parent was killed. If a step
fails or is stopped, its workers are killed, also in the middle of a task. If a worker is killed, the step fails.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar, TypeVarTuple

from .cores import cores
from .cpu_memory import keep_freed_memory
from .errors import RetryableError, UserError

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

SHARED_MEMORY = "/dev/shm"  # noqa: S108
"""Where Linux keeps what processes share."""

KEPT_MEMORY = 2**28
"""Bytes of freed memory that a worker keeps for its next image."""

_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here, because a forked process of a parent with threads might wait forever for the loader's lock.
_C_LIBRARY = ctypes.CDLL(None)
_SECONDS_BETWEEN_CHECKS = 1.0


@contextmanager
def worker_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A process pool whose workers end with the block: at once if it fails, otherwise when their tasks are done.

    Raises:
        UserError: Processes can share nothing on this machine.
    """
    require_shared_memory()
    pool = ProcessPoolExecutor(workers, _CONTEXT, _start, (initializer, initargs))
    try:
        yield pool
    except BaseException:
        kill_workers(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def kill_workers(pool: ProcessPoolExecutor) -> None:
    """Kill a pool's workers, whatever they do; all its futures end."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    # A worker may be killed when it has written only a part of a result. The pool's thread waits for the rest until
    # nobody has the pipe open for writing.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]


def require_living_workers(pool: ProcessPoolExecutor) -> None:
    """Fail if a worker was killed, which the pool itself does not notice while it waits for the rest of a result.

    Raises:
        BrokenProcessPool: A worker was killed.
    """
    if any(process.exitcode is not None for process in list((pool._processes or {}).values())):
        raise BrokenProcessPool("A worker process was killed.")


def require_shared_memory() -> None:
    """Fail if processes cannot share locks, for which they need `SHARED_MEMORY`.

    Raises:
        UserError: They cannot.
    """
    try:
        _CONTEXT.Lock()
    except OSError as error:
        raise UserError(
            f"{SHARED_MEMORY}: {error.strerror}; the processes of this step share memory there; give the container a "
            f"writable {SHARED_MEMORY} (`shared_memory` in a profile)."
        ) from error


def shared_counter() -> Any:
    """A number that processes share, as `.value`; starts at 0."""
    require_shared_memory()
    return _CONTEXT.Value("q", 0)


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, whatever ends that thread."""
    if sys.platform == "linux":
        _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def map_in_order(
    step: str,
    work: Callable[[*Arguments], Result],
    calls: Iterable[tuple[*Arguments]],
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Call a function in one process per core; only a window of arguments and results is in memory.

    Args:
        step: Name of the step, for the error message.
        work: Function to call, defined at the top level of a module.
        calls: Arguments of each call, read while the calls run.
        initializer: Function that each process calls first.
        initargs: Arguments of the initializer.

    Yields:
        The result of each call, in the order of the calls.

    Raises:
        RetryableError: The operating system killed a process.
    """
    workers = cores()
    waiting: deque[Future[Result]] = deque()
    with worker_pool(workers, initializer, initargs) as pool:
        try:
            for arguments in calls:
                waiting.append(pool.submit(work, *arguments))
                if len(waiting) > 2 * workers:
                    yield _result(waiting.popleft(), pool)
            while waiting:
                yield _result(waiting.popleft(), pool)
        except BrokenProcessPool as error:
            raise RetryableError(
                f"{step}: the operating system killed a worker process, most likely for lack of memory; try again with "
                "more memory."
            ) from error


def _result(future: Future[Result], pool: ProcessPoolExecutor) -> Result:
    while not futures.wait([future], _SECONDS_BETWEEN_CHECKS).done:
        require_living_workers(pool)
    return future.result()


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # The parent's own handler would raise an exception in the worker's task, and the worker would live on. Ctrl-C also
    # reaches the parent, which then ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory(KEPT_MEMORY)
    if sys.platform != "linux":
        threading.Thread(target=_wait_for_parents_end, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _wait_for_parents_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
