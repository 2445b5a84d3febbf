"""Worker processes of a step.

A forked worker starts in milliseconds and shares the memory of everything that is imported and loaded. The price:
forking must happen before the process has threads, so all workers of a pool start with its first task. A worker ends
when its parent ends, even if the parent was killed; otherwise it would wait for tasks forever.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar, TypeVarTuple

from .errors import RetryableError

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
"""Creates objects that processes share, such as a counter."""


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def worker_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A process pool whose workers do not outlive this process."""
    return ProcessPoolExecutor(workers, CONTEXT, _start, (initializer, initargs))


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
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RetryableError(
                f"{step}: the operating system killed a worker process, most likely for lack of memory; try again with "
                "more memory."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
