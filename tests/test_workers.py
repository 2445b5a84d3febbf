import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count

import psutil
import pytest

from minicpmv_finetune.errors import RetryableError
from minicpmv_finetune.workers import map_in_order

PARENT = """
import time
from minicpmv_finetune.workers import map_in_order

def work(number):
    if number > 8:
        time.sleep(3600)
    return number

for result in map_in_order("step", work, ((number,) for number in range(100))):
    print(result, flush=True)
"""


def half(number: int, of: int) -> float:
    return of / number


def die(number: int) -> None:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_only_a_window_is_read() -> None:
    read: list[int] = []

    def calls() -> Iterator[tuple[int, int]]:
        for number in count(1):
            read.append(number)
            yield number, 12

    results = map_in_order("step", half, calls())
    assert [next(results) for _ in range(4)] == [12, 6, 4, 3]
    assert len(read) < 20
    results.close()  # type: ignore[attr-defined]


def test_an_error_of_the_work_is_the_caller_s() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order("step", half, [(1, 2), (0, 2)]))


def test_a_killed_process_is_reported_as_lack_of_memory() -> None:
    with pytest.raises(
        RetryableError, match=r"^step: the operating system killed a worker .* lack of memory; try again"
    ):
        list(map_in_order("step", die, ((number,) for number in range(20))))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:
                break
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        ended, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert ended
    assert not alive
