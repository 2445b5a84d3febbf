"""Every process of a command ends with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that starts a child in a session of its own, which ignores SIGTERM on request, and another that is orphaned.
COMMAND = """
setsid {python} -c '
import os, signal, sys, time
signal.signal(signal.SIGTERM, {reaction})
open("{folder}/child", "w").write(str(os.getpid()))
time.sleep(60)' &
({python} -c 'import os, time; open("{folder}/orphan", "w").write(str(os.getpid())); time.sleep(60)' &)
{end}
"""
WAIT = "wait"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def tree(folder: Path, end: str = WAIT, reaction: str = "signal.SIG_IGN") -> list[str]:
    text = COMMAND.format(python=sys.executable, folder=folder, end=end, reaction=reaction)
    return [sys.executable, "-m", "minicpmv_finetune.process_tree", "sh", "-c", text]


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 20
    files = [folder / "child", folder / "orphan"]
    while time.monotonic() < deadline:
        if all(file.exists() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture
def parent(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that starts a tree and waits for it."""
    code = f"import subprocess; subprocess.run({tree(tmp_path)!r}, start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        yield process
        process.kill()


def wait_until_gone(processes: list[int], seconds: float = 20) -> list[int]:
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in processes if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def test_processes_that_a_command_left_behind_end_soon_after_it(tmp_path: Path) -> None:
    end = f"while [ ! -s {tmp_path}/child ] || [ ! -s {tmp_path}/orphan ]; do sleep 0.05; done; exit 3"
    done = subprocess.run(tree(tmp_path, end), start_new_session=True, timeout=30)
    assert done.returncode == 3
    assert [pid for pid in pids(tmp_path) if is_alive(pid)] == []


def test_a_second_request_ends_every_process_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(tree(tmp_path), start_new_session=True) as process:
        started = pids(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert wait_until_gone(started[1:]) == [], "the group gets the signal"
        assert process.poll() is None, "a process that saves its state is waited for"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert [pid for pid in started if is_alive(pid)] == []


def test_a_killed_parent_takes_every_process_with_it(tmp_path: Path, parent: "subprocess.Popen[bytes]") -> None:
    child, orphan = pids(tmp_path)
    parent.kill()
    assert wait_until_gone([orphan]) == []
    os.kill(child, signal.SIGKILL)  # ignores SIGTERM, as a training that saves its state for minutes
