"""Training processes, parity checks and steps of pipelines that start with the libraries imported.

Torch, transformers and PEFT take six seconds of a core to import, MLflow and KFP three more, and most of these
processes then compute for less than two. Here a server imports them once and forks for each process (the fork server of
`multiprocessing`). What a process does is the same; how it starts and ends is tested by the tests that start the
commands themselves, such as those of resumption, of the endings of a training and of a whole run on this machine.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import IO, Any, Self

import psutil
import pytest

from minicpmv_finetune.components.merge.merge import PARITY_CHECK
from minicpmv_finetune.components.train.flags import read_flags
from minicpmv_finetune.components.train.launch import WORKER

ROOT = Path(__file__).parents[1]
_IMPORTS = "tests.warm_imports"
_STEP = "kfp.dsl.executor_main"
_STDOUT, _STDERR = 1, 2
_starting = Lock()  # the working directory belongs to all threads


class WarmProcess:
    """Stands for the `subprocess.Popen` of `python -m MODULE …`.

    Attributes:
        pid: Id of the process.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        outputs: tuple[int, int] = (_STDOUT, _STDERR),
    ) -> None:
        """Start the process; it has this one's working directory, and its output too unless others are given."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_IMPORTS, __name__])
        streams = [Connection(os.dup(number), readable=False) for number in outputs]
        with _starting:
            settings = (module, list(arguments), dict(variables), str(Path.cwd()), *streams)
            self._process = context.Process(target=_run, args=settings)
            with chdir(ROOT):  # where the server finds what it is to import
                self._process.start()
        for stream in streams:
            stream.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that ended the process; None as long as it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, if the process has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended, and return its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired([], timeout or 0)
        return self.returncode


def _run(
    module: str, arguments: list[str], variables: dict[str, str], folder: str, stdout: Connection, stderr: Connection
) -> None:
    assert _IMPORTS in sys.modules, "the server could not import the libraries"
    multiprocessing.set_start_method(None, force=True)  # what this process starts itself is forked as usual
    os.setsid()
    for stream, number in ((stdout, _STDOUT), (stderr, _STDERR)):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    # This process's server is the one that forked it.
    vars(forkserver._forkserver)["ensure_running"] = resource_tracker.ensure_running
    try:
        with warm_processes():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out


def _start_worker(args: Sequence[str], env: Mapping[str, str], **options: Any) -> Any:
    """Do what torchrun wants of `subprocess.Popen`."""
    # Not above: a warm process imports this module, and then runs that one as its program.
    from minicpmv_finetune.components.train.worker import needs_bitsandbytes

    _, unbuffered, module, name, *arguments = args
    assert (unbuffered, module) == ("-u", "-m")
    assert not options["stdout"]
    assert not options["stderr"]
    # The server has imported PEFT without bitsandbytes.
    if name == WORKER and needs_bitsandbytes(read_flags(arguments)[1]):
        return subprocess.Popen(args, env=env, **options)
    return WarmProcess(name, arguments, env)


@contextmanager
def warm_processes() -> Iterator[None]:
    """Start the processes of torchrun in this process, and parity checks, warm for a block."""
    run = subprocess.run

    def run_check(command: Sequence[str], **options: Any) -> Any:
        if command[1:3] != ["-m", PARITY_CHECK]:
            return run(command, **options)
        return subprocess.CompletedProcess(command, WarmProcess(PARITY_CHECK, command[3:], os.environ).wait())

    with pytest.MonkeyPatch.context() as patch:
        handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
        patch.setattr(f"{handler}.Popen", _start_worker)
        patch.setattr("subprocess.run", run_check)
        yield


def running_warm_processes() -> list[psutil.Process]:
    """The processes that the server has forked, for this process or for one of them, and that still run."""
    server = vars(forkserver._forkserver)["_forkserver_pid"]
    forks = psutil.Process(server).children() if server else []
    return [process for process in forks if process.status() != psutil.STATUS_ZOMBIE]


class WarmCommand(WarmProcess):
    """Stands for the `subprocess.Popen` of `python -m MODULE …`, with a pipe for what it prints.

    Attributes:
        stdout: What the process and those that it starts print, errors too.
    """

    def __init__(self, module: str, arguments: Sequence[str], variables: Mapping[str, str] = os.environ) -> None:
        reader, writer = os.pipe()
        super().__init__(module, arguments, variables, (writer, writer))
        os.close(writer)
        self.stdout: IO[str] = os.fdopen(reader, errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()


class _WarmStep(WarmCommand):
    """Stands for the `subprocess.Popen` of a step, a component's source that KFP has a shell write and run."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        _, source, *arguments = command[command.index("-ec") + 1 :]
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name) / "ephemeral_component.py"
        program.write_text(source)
        super().__init__(_STEP, ["--component_module_path", str(program), *arguments], variables)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._folder.cleanup()


@contextmanager
def warm_steps() -> Iterator[None]:
    """Start the steps of pipelines that run on this machine warm for a block, and the processes that they start."""

    def start(command: Sequence[str], env: Mapping[str, str], **options: Any) -> _WarmStep:
        return _WarmStep(command, env)

    def run(full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
        with _WarmStep(full_command, {**os.environ, **(env_vars or {})}) as step:
            for line in step.stdout:
                print(line, end="")
            return step.wait()

    with pytest.MonkeyPatch.context() as patch:
        popen = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
        patch.setattr("minicpmv_finetune.pipelines.local_steps.subprocess", popen)
        patch.setattr("minicpmv_finetune.pipelines.local._may_fork", lambda *_: False)  # this server is there already
        patch.setattr("kfp.local.subprocess_task_handler.run_local_subprocess", run)
        yield
