import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from itertools import count

import psutil
import pytest

from minicpmv_finetune.errors import RetryableError
from minicpmv_finetune.workers import map_in_order, require_living_workers, worker_pool

PARENT = """
import signal, sys, time
from minicpmv_finetune.workers import map_in_order

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as the command line does

def work(number):
    if number > 8:
        time.sleep(3600)
    return number

for result in map_in_order("step", work, ((number,) for number in range(100))):
    print(result, flush=True)
"""


def divide(divisor: int, dividend: int) -> float:
    return dividend / divisor


def kill_process_at_five(number: int) -> None:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def count_new_pages(number: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_results_are_in_order_and_only_a_window_of_calls_is_read() -> None:
    read: list[int] = []

    def calls() -> Iterator[tuple[int, int]]:
        for number in count(1):
            read.append(number)
            yield number, 12

    results = map_in_order("step", divide, calls())
    assert [next(results) for _ in range(4)] == [12, 6, 4, 3]
    assert len(read) < 20
    results.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such setting")
def test_a_worker_uses_the_memory_of_an_image_for_the_next_one() -> None:
    (pages,) = map_in_order("step", count_new_pages, [(0,)])
    assert pages < 2 * 40 * 2**20 / resource.getpagesize()


def test_an_error_of_a_call_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order("step", divide, [(1, 2), (0, 2)]))


def test_a_killed_process_is_reported_as_lack_of_memory() -> None:
    with pytest.raises(
        RetryableError, match=r"^step: the operating system killed a worker .* lack of memory; try again"
    ):
        list(map_in_order("step", kill_process_at_five, ((number,) for number in range(20))))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_step_that_ends_in_the_middle_of_its_tasks_leaves_no_process(number: signal.Signals) -> None:
    with _parent() as process:
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, alive = psutil.wait_procs([*workers, psutil.Process(process.pid)], timeout=10)
    for survivor in alive:
        survivor.kill()
    assert workers
    assert not alive


def test_a_step_ends_when_one_of_its_busy_workers_is_killed() -> None:
    with _parent() as process:
        workers = psutil.Process(process.pid).children()
        workers[0].kill()
        try:
            _, log = process.communicate(timeout=10)
        finally:
            process.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
    assert "the operating system killed a worker process" in log
    assert not alive


def _parent() -> "subprocess.Popen[str]":
    """A process whose pool's workers are in the middle of tasks that take an hour."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 4:
            break
    return process


def test_a_worker_that_is_killed_while_it_writes_a_result_ends_the_pool() -> None:
    with pytest.raises(BrokenProcessPool):
        _kill_while_writing()


def _kill_while_writing() -> None:
    with worker_pool(2) as pool:
        unfinished = pool.submit(time.sleep, 3600)
        pid = pool.submit(os.getpid).result()
        # The beginning of a message, of which the rest never comes.
        os.write(pool._result_queue._writer.fileno(), struct.pack("!i", 1000))  # type: ignore[attr-defined]
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        while not wait([unfinished], 0.2).done:
            require_living_workers(pool)


def test_without_shared_memory_the_error_names_it() -> None:
    unshare = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    code = "from minicpmv_finetune.workers import map_in_order; list(map_in_order('step', print, [(1,)]))"
    done = subprocess.run([*unshare, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "UserError: /dev/shm: Read-only file system; " in done.stderr
    assert "`shared_memory` in a profile" in done.stderr
