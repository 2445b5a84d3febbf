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


def divide(divisor: int, dividend: int) -> float:
    return dividend / divisor


def kill_process_at_five(number: int) -> None:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


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


def test_an_error_of_a_call_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order("step", divide, [(1, 2), (0, 2)]))


def test_a_killed_process_is_reported_as_lack_of_memory() -> None:
    with pytest.raises(
        RetryableError, match=r"^step: the operating system killed a worker .* lack of memory; try again"
    ):
        list(map_in_order("step", kill_process_at_five, ((number,) for number in range(20))))


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
