"""Processes that work beside a step's own.

Forked, a worker starts in milliseconds and shares the memory of what is imported and loaded. What forking costs: it
must happen before there are threads, so a pool's workers all start with its first task. A worker ends when its parent
does, however that died; else it would wait for tasks for ever.
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
"""Makes what processes share, such as a counter."""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def worker_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool whose processes do not outlive this one."""
    return ProcessPoolExecutor(workers, CONTEXT, _start, (initializer, initargs))


def map_in_order(
    step: str,
    work: Callable[[*Arguments], Result],
    calls: Iterable[tuple[*Arguments]],
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Work in as many processes as there are cores; only a window of arguments and results is in memory.

    Args:
        step: whose work it is, for the message.
        work: a function of a module.
        calls: the arguments of each call, read as the work goes on.
        initializer: called first in each process.
        initargs: its arguments.

    Yields:
        what each call returns, in their order.

    Raises:
        RetryableError: the system killed a process.
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
                f"{step}: the system ended a process that reads images, most likely for lack of memory; try again "
                "with more."
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
