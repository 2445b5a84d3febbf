"""Start programs as forks of a process that has imported their libraries.

    python -m minicpmv_finetune.fork_server SOCKET MODULE …

Torch, transformers, PEFT and MLflow take seconds of a core to import, in each of the ten processes of a run on this
machine. Here a server imports them once, MODULE by MODULE, and forks for each program. The server only imports: it
computes nothing, so it has no threads of OpenMP and no state of a GPU; the threads of OpenBLAS and jemalloc end at a
fork by those libraries' own handlers. Where a driver for GPUs is installed there is no server (`is_possible`).

A server can itself be a fork of another one, and begins with what that one has imported. It imports on, while the other
one goes on to fork for programs that need no more.

A program runs as `python -m MODULE …` would: as `__main__`, with its own arguments, environment, folder and output,
and it ends as an interpreter ends. Above it is a `ProcessTree`, which belongs to the program alone. That one forks too,
for the program: what a step starts is no fork of the step, which has threads by then.
"""

import atexit
import ctypes
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Self

from .process_tree import INTERVAL, ProcessTree
from .workers import end_with_parent

_MODULE = "minicpmv_finetune.fork_server"
_STDOUT, _STDERR = 1, 2
# Of NVIDIA (also on Jetson), AMD and Huawei, and in Windows' Linux. Not /dev/dri, which every laptop has.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg", "/dev/davinci_manager")
# Blocked from before a fork until the fork handles them as its program does, so that none is lost in between.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def is_possible() -> bool:
    """Whether programs may be forks here: on Linux, without a GPU, whose state no fork can share."""
    return sys.platform == "linux" and not any(Path(driver).exists() for driver in _GPU_DRIVERS)


@dataclass(frozen=True)
class _Program:
    """What a fork runs.

    Attributes:
        module: Module that runs as `__main__`.
        arguments: Its arguments.
        variables: Its whole environment.
        folder: Its working directory.
        leads_tree: Whether it gets a `ProcessTree`, and with it a session of its own.
        own_session: Whether it gets a session of its own in its tree.
    """

    module: str
    arguments: list[str]
    variables: dict[str, str]
    folder: str
    leads_tree: bool
    own_session: bool


class _InFork(BaseException):
    """Leaves the server's loop in a fork."""

    def __init__(self, program: _Program, descriptors: Sequence[int]) -> None:
        self.program = program
        self.descriptors = descriptors


class ForkedProcess:
    """A program in a fork, as a `subprocess.Popen`.

    Attributes:
        pid: Id of the process, or of its tree's first process.
        stdout: What the program and its processes print, errors too; None if they print where this process does.
        returncode: Exit code, or minus the number of the signal that ended it; None as long as it is not known to have
            ended.
    """

    def __init__(self, report: socket.socket, stdout: IO[str] | None) -> None:
        self._report = report.makefile("r")
        report.close()
        self.stdout = stdout
        self.returncode: int | None = None
        self.pid = int(self._report.readline() or 0)
        if not self.pid:
            self._report.close()
            if stdout:
                stdout.close()
            raise ConnectionError("the fork server has ended, or cannot fork")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout:
            self.stdout.close()
        self.wait()

    def poll(self) -> int | None:
        """Return the exit code, if the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended in time.
        """
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            # A server that was killed reports nothing; its forks get this signal then.
            self.returncode = int(self._report.readline() or -signal.SIGTERM)
            self._report.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkClient:
    """Asks a server for forks."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        leads_tree: bool = False,
        own_session: bool = False,
        kept: Sequence[int] = (),
    ) -> ForkedProcess:
        """Start a program.

        Args:
            module: Module that runs as `__main__`.
            arguments: Its arguments.
            variables: Its whole environment.
            leads_tree: Whether all its processes end with it, and what they print is read here; otherwise they print
                where this process does.
            own_session: Whether it gets a session of its own.
            kept: Descriptors that stay open as long as the program's tree lives.

        Raises:
            ConnectionError: The server has ended, or cannot fork.
        """
        report, servers_report = socket.socketpair()
        program = _Program(
            module, list(arguments), dict(variables), str(Path.cwd()), leads_tree, leads_tree or own_session
        )
        with servers_report, ExitStack() as outputs:
            stdout, both = None, (_STDOUT, _STDERR)
            if leads_tree:
                reader, writer = os.pipe()
                stdout = os.fdopen(reader, encoding="utf-8", errors="replace")
                both = (writer, writer)
                outputs.callback(os.close, writer)
            socket.send_fds(self._control, [b"f"], [servers_report.fileno(), *both, *kept])
            report.sendall(f"{json.dumps(asdict(program))}\n".encode())
        return ForkedProcess(report, stdout)


class ForkServer(ForkClient):
    """A server of this process, which ends with it."""

    def __init__(self, imports: Sequence[str], base: "ForkServer | None" = None) -> None:
        """Start the server; it imports while this process does something else.

        Args:
            imports: Modules to import; a program that is started before the last one finds at least the first.
            base: Server whose fork this one is; by default it is a new interpreter.

        Raises:
            ConnectionError: The other server has ended, or cannot fork.
        """
        control, servers_control = socket.socketpair()
        super().__init__(control)
        with servers_control:
            number = servers_control.fileno()
            if base:
                self._process: subprocess.Popen[bytes] | ForkedProcess = base.start(
                    _MODULE, imports, os.environ, own_session=True, kept=[number]
                )
                return
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", _MODULE, str(number), *imports],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                pass_fds=(number,),
                start_new_session=True,
            )

    def wait_for_imports(self, timeout: float | None = None) -> bool:
        """Wait until the server has imported everything, at most for some seconds; returns whether it has."""
        return bool(select.select([self._control], [], [], timeout)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


_client: ForkClient | None = None


def fork_client() -> ForkClient | None:
    """What starts forks for this program; None if the program itself is no fork."""
    return _client


def run_program(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE …`, as a fork if this program is one; returns the exit code, or minus a signal's number."""
    if _client:
        with suppress(ConnectionError):
            return _client.start(module, arguments, os.environ).wait()
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode  # noqa: S603


class _Server:
    """Forks on request, and reports how the forks end."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.is_over = False
        self._reports: dict[int, socket.socket] = {}

    def wait(self, seconds: float) -> None:
        """Wait for a request, and fork for it.

        Raises:
            _InFork: This process is the fork.
        """
        if self.is_over:
            time.sleep(seconds)
            return
        if not select.select([self.control], [], [], seconds)[0]:
            return
        request, descriptors, _, _ = socket.recv_fds(self.control, 1, 8)
        if not request:
            self.is_over = True
            return
        report = socket.socket(fileno=descriptors[0])
        with report.makefile("rb") as file:
            line = file.readline()
        pid = -1
        if line.endswith(b"\n"):  # who asks may have been killed
            program = _Program(**json.loads(line))
            with suppress(OSError):  # no memory is left, or too many processes
                pid = _fork(program.own_session)
        if not pid:
            for connection in (self.control, report, *self._reports.values()):
                connection.close()
            raise _InFork(program, descriptors[1:])
        for number in descriptors[1:]:
            os.close(number)
        if pid > 0:
            self._reports[pid] = report
            self._say(report, pid)
        else:
            report.close()

    def report(self, pid: int, status: int) -> None:
        """Tell who asked for a process that it has ended."""
        if report := self._reports.pop(pid, None):
            self._say(report, os.waitstatus_to_exitcode(status))
            report.close()

    def serve(self, seconds: float) -> None:
        """Fork for a request, and report what has ended."""
        self.wait(seconds)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.report(*ended)

    @staticmethod
    def _say(report: socket.socket, number: int) -> None:
        with suppress(OSError):  # nobody listens any more
            report.sendall(f"{number}\n".encode())


def _fork(own_session: bool) -> int:
    """Fork as `os.fork` does, but with `_SIGNALS` blocked in the fork, and after it has its session."""
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = -1
    try:
        pid = os.fork()
        if not pid and own_session:
            os.setsid()
    finally:
        os.close(writer)
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.read(reader, 1)  # until the fork has closed its copy too
        os.close(reader)
    return pid


def _main(control: socket.socket, imports: Sequence[str], base: int = 0) -> None:
    """Serve until who started the server has ended.

    Args:
        control: Where requests come from.
        imports: Modules to import.
        base: Process id of the server whose fork this one is; 0 for a new interpreter.
    """
    end_with_parent()
    if base and os.getppid() != base:
        return  # it ended before the kernel was asked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # of a server that is a fork
    pid = os.getpid()
    server = _Server(control)
    try:
        for name in imports:
            with suppress(Exception):  # a fork that needs it imports it itself, and shows the traceback
                import_module(name)
            # Otherwise the garbage collector of each fork would write to, and so copy, the memory that they share.
            gc.freeze()
            server.serve(0)
        control.send(b"r")
        while not server.is_over:
            server.serve(INTERVAL)
        return
    except _InFork as fork:
        program, descriptors = fork.program, fork.descriptors
    if program.module == _MODULE:
        *outputs, number = descriptors
        for descriptor in outputs:
            os.close(descriptor)
        _show_command(program)
        _main(socket.socket(fileno=number), program.arguments, pid)
        return
    _take(program, descriptors)
    if program.leads_tree:
        program = _lead_tree(program)
    _run(program)


def _take(program: _Program, descriptors: Sequence[int]) -> None:
    """Make this fork's environment, folder and output those of its program."""
    for descriptor, number in zip(descriptors, (_STDOUT, _STDERR), strict=False):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(program.folder)
    os.environ.clear()
    os.environ.update(program.variables)
    _show_command(program)


def _show_command(program: _Program) -> None:
    """Let `ps` show the program, as far as there is room, instead of the server's command."""
    with suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        first, end = map(int, fields[45:47])  # arg_start and arg_end of proc(5)
        shown = "\0".join([sys.executable, "-m", program.module, *program.arguments]).encode()[: end - first - 1]
        ctypes.memmove(first, shown.ljust(end - first, b"\0"), end - first)


def _lead_tree(program: _Program) -> _Program:
    """Fork for the program of a tree, and end with it; returns what to run in this process, which is a fork then."""
    global _client
    ours, theirs = socket.socketpair()
    server = _Server(theirs)
    tree = ProcessTree(os.fork, server.wait, server.report)
    if not tree.pid:  # in the fork, whose signals are blocked still
        theirs.close()
        _client = ForkClient(ours)
        return program
    ours.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        os._exit(tree.wait())
    except _InFork as fork:
        _take(fork.program, fork.descriptors)
        return fork.program


def _run(program: _Program) -> None:
    """Run a program as the interpreter would that is started for it."""
    # As the interpreter handles what a `ProcessTree` handles too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    tempfile.tempdir = None  # the server's
    modules: dict[str, Any] = sys.modules
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if numpy := modules.get("numpy"):
        numpy.random.seed()  # otherwise all programs would draw the same numbers
    threads = program.variables.get("OMP_NUM_THREADS", "")
    if (torch := modules.get("torch")) and threads.isdecimal() and int(threads):
        torch.set_num_threads(int(threads))  # OpenMP reads it when it is loaded
    modules.pop(program.module, None)  # it runs as `__main__`, and so is loaded again
    sys.argv = [program.module, *program.arguments]
    try:
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)
        _end(0)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            _end(end.code or 0)
        raise
    finally:
        gc.unfreeze()  # what is frozen would look like a leak when the interpreter ends


def _end(code: int) -> None:
    """End the program, with all that its libraries do at the end, but without taking the interpreter apart.

    That would write to every object, and so copy all memory that the forks share: three seconds of a core.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    # Not the module that runs here: programs import this one by its name.
    from minicpmv_finetune import fork_server

    fork_server._main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
