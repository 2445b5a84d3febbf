"""Run a command, and end every process that it started: when asked to, and when the program that wanted it has ended.

    python -m minicpmv_finetune.process_tree COMMAND …

A step starts processes that start processes, some in sessions of their own. This program adopts those whose parent
ends before them (`PR_SET_CHILD_SUBREAPER`), so that none can stay behind unnoticed. On SIGTERM it passes the signal on
to the step and waits, because a training finishes its step and saves it; on SIGINT, or when the time is up, it kills
what is left. It asks the kernel for SIGTERM when its own parent ends (`PR_SET_PDEATHSIG`), however that happened.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SECONDS_TO_STOP = 120.0  # torchrun itself gives a training 30 s to save; an upload may follow
_SECONDS_AFTER_COMMAND = 5.0  # for processes that the command left behind
INTERVAL = 0.05
"""Seconds between two looks at the processes."""


class ProcessTree:
    """A command and all processes that it started.

    Attributes:
        pid: Id of the command's process; -1 if it was not started, because this process was asked to end.
    """

    def __init__(
        self,
        start: Callable[[], int],
        idle: Callable[[float], None] = time.sleep,
        ended: Callable[[int, int], None] = lambda pid, status: None,
    ) -> None:
        """Start the command; this process must lead a process group of its own.

        Args:
            start: Starts the command, and returns the id of its process.
            idle: Waits for some seconds.
            ended: Learns of each process that has ended: its id and its status.
        """
        self._idle = idle
        self._ended = ended
        self.is_stopping = False
        self.deadline = float("inf")
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGINT, self._kill)
        if sys.platform == "linux":
            parent = os.getppid()
            prctl = ctypes.CDLL(None).prctl
            prctl(_PR_SET_CHILD_SUBREAPER, 1)
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                self._stop(signal.SIGTERM, None)  # the parent ended before the kernel was asked
        self.pid = start() if not self.is_stopping else -1

    def wait(self) -> int:
        """Wait until no process is left, and return the command's exit code as a shell reports it."""
        code = -signal.SIGTERM  # of a command that was not started
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code if code >= 0 else 128 - code
            if pid:
                self._ended(pid, status)
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                if not self.is_stopping:
                    self.deadline = time.monotonic() + _SECONDS_AFTER_COMMAND
            elif not pid:
                if time.monotonic() > self.deadline:
                    _signal_children(signal.SIGKILL)
                self._idle(INTERVAL)

    def _stop(self, number: int, frame: object) -> None:
        self.is_stopping = True
        self.deadline = time.monotonic() + _SECONDS_TO_STOP
        # To the whole group, because the shell that kfp puts before a step does not pass the signal on.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)

    def _kill(self, number: int, frame: object) -> None:
        self.is_stopping = True
        self.deadline = 0.0


def _signal_children(number: int) -> None:
    """Send a signal to the direct children; the children of a killed one are adopted, and are next."""
    with suppress(OSError):
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)


if __name__ == "__main__":
    command: list[subprocess.Popen[bytes]] = []

    def _start() -> int:
        command.append(subprocess.Popen(sys.argv[1:]))  # noqa: S603
        return command[0].pid

    sys.exit(ProcessTree(_start).wait())
