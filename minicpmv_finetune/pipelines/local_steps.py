"""How the steps of a run on this machine are started, reused and stopped.

kfp.local would start a step in this process's group, and Ctrl-C would end both at once, in any order. Here each step
has a group of its own, this process passes the signal on, and waits until the step has saved its state and ended.

Where a fork server is possible, the steps are forks (`step_servers`).
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from minicpmv_finetune.fork_server import ForkedProcess
from minicpmv_finetune.progress import OUTCOME_MARK
from minicpmv_finetune.tracking.step_runs import INCOMPLETE, finish_pipeline_run

from .run_display import FINISHED_BEFORE, RunDisplay
from .run_folder import RunFolder, Step
from .step_servers import StepServers

CONTAINER_LABEL = "minicpmv-finetune.run"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_FOR_CONTAINER = 120


@dataclass
class RunSteps:
    """Stands between kfp.local and the steps.

    Attributes:
        folder: Folder of the run.
        display: Shows the run, and knows what the current step printed.
        lock: Descriptor of the lock that the steps inherit.
        in_containers: Whether the steps run in containers.
        servers: Servers whose forks the steps are; None if each is a new interpreter.
        stopped_by: Number of the signal that stopped the run; 0 for none.
        stopped_in: Name of the step that ran then; empty if none ran.
        error: What that step said about its end; empty if it said nothing.
        reused: Seconds that each step took that an earlier attempt had finished.
    """

    folder: RunFolder
    display: RunDisplay
    lock: int
    in_containers: bool = False
    servers: StepServers | None = None
    stopped_by: int = 0
    stopped_in: str = ""
    error: str = ""
    reused: dict[str, float] = field(default_factory=dict)
    _process: "subprocess.Popen[str] | ForkedProcess | None" = None

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Let kfp.local start its steps here, in the folder of this run, and handle signals."""
        from kfp.local import executor_input_utils, subprocess_task_handler
        from kfp.local.orchestrator import enhanced_dag_orchestrator

        patches: list[tuple[Any, str, Any]] = [
            (executor_input_utils, "get_local_pipeline_resource_name", lambda pipeline: self.folder.path.name),
            (subprocess_task_handler, "run_local_subprocess", self._run_subprocess),
            (enhanced_dag_orchestrator.ConditionEvaluator, "_resolve_pipeline_channel", _condition_value),
        ]
        if self.in_containers:
            from kfp.local import docker_task_handler

            run_container = self._container_runner(docker_task_handler.run_docker_container)
            patches.append((docker_task_handler, "run_docker_container", run_container))
        with _replaced(patches), _handling_signals(self._stop):
            yield

    def _run_subprocess(self, full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
        return self._run(full_command, lambda step: self._execute(step, full_command, env_vars))

    def _container_runner(self, run_container: Callable[..., int]) -> Callable[..., int]:
        def run(command: Sequence[str], **options: Any) -> int:
            return self._run(command, lambda step: run_container(command=command, **options))

        return run

    def _run(self, command: Sequence[str], execute: Callable[[str], int]) -> int:
        """Run a step unless it is finished; returns its exit code.

        Args:
            command: The step's command.
            execute: Runs it, given the step's name.
        """
        if self.stopped_by:
            return 1
        step = Step(command)
        key = step.key()
        if before := step.finished(key):
            print(f"{OUTCOME_MARK}{FINISHED_BEFORE}{before.outcome}")
            self.reused[step.folder.name] = before.seconds
            return 0
        step.clear()
        started = time.monotonic()
        code = execute(step.folder.name)
        if self.stopped_by:
            # kfp.local still goes through the steps that report a failure.
            self.error = self.display.error
        if code == 0 and not self.stopped_by:
            step.finish(key, self.display.outcome, round(time.monotonic() - started, 1))
        return code

    def _execute(self, step: str, command: Sequence[str], variables: Mapping[str, str] | None) -> int:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **(variables or {})}
        with (
            tempfile.TemporaryDirectory() as folder,
            self._fork(step, command, environment, Path(folder)) or self._spawn(command, environment) as process,
        ):
            self._process = process
            if self.stopped_by:  # while the step started
                process.send_signal(signal.SIGTERM)
            for line in process.stdout or ():
                print(line, end="")
            return process.wait()

    def _fork(
        self, step: str, command: Sequence[str], variables: Mapping[str, str], folder: Path
    ) -> ForkedProcess | None:
        """Start a step as a fork; None if it cannot be."""
        if not self.servers or command[:2] != ["sh", "-ec"]:
            return None
        # What kfp's shell does: write the component's source to a file, and run it.
        _, _, _, source, *arguments = command
        program = folder / "ephemeral_component.py"
        program.write_text(source, encoding="utf-8")
        with suppress(ConnectionError):
            return self.servers.of(step, lambda: bool(self.stopped_by)).start(
                "kfp.dsl.executor_main",
                ["--component_module_path", str(program), *arguments],
                {**variables, "_KFP_RUNTIME": "true"},
                leads_tree=True,
                kept=[self.lock],
            )
        return None

    def _spawn(self, command: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
        """Start a step in a new interpreter."""
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "minicpmv_finetune.process_tree", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # The marks of an outcome and of progress are read here, whatever encoding the terminal has.
            encoding="utf-8",
            errors="replace",
            bufsize=1,
            env=variables,
            start_new_session=True,
            pass_fds=(self.lock,),
        )

    def end_tracking(self, status: str) -> None:
        """Close the run in MLflow, in a fork if that is possible, so that this process need not import MLflow."""
        if self.servers:
            module = "minicpmv_finetune.pipelines.end_tracking"
            with suppress(ConnectionError):
                if self._show_end(self.servers.first.start(module, [status], os.environ, leads_tree=True)) == 0:
                    return
        finish_pipeline_run(status)

    def _show_end(self, tracking: ForkedProcess) -> int:
        """Show what the process that closes the run says about a failure, and log the rest; returns its exit code."""
        with tracking:
            try:
                for line in tracking.stdout or ():
                    if line.startswith(INCOMPLETE):
                        self.display.say(f"warning: {line.rstrip()}")
                    else:
                        self.display.log.write(line)
            except BaseException:  # Ctrl-C reaches no other session
                tracking.send_signal(signal.SIGTERM)
                raise
            return tracking.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ask the running step to end; the second time, end it at once."""
        is_first = not self.stopped_by
        self.stopped_by = self.stopped_by or number
        if is_first:
            self.stopped_in = self.display.step
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            self.display.say(f"stopping: {self.stopped_in or 'the run'} may save its state first{again}")
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if is_first else signal.SIGINT)
        if self.in_containers:
            seconds = _SECONDS_FOR_CONTAINER if is_first else 0
            threading.Thread(target=_stop_containers, args=(self.folder.path.name, seconds), daemon=True).start()


def _condition_value(channel: str, store: Any) -> Any:
    """The value that a condition depends on; kfp.local itself finds only outputs that have no name of their own.

    Args:
        channel: pipelinechannel--TASK-OUTPUT.
        store: kfp.local's store of the outputs of tasks.
    """
    task, _, output = channel.removeprefix("pipelinechannel--").rpartition("-")
    return store.get_task_output(task, output)


def _stop_containers(run: str, seconds: int) -> None:
    """Stop the containers of a run."""
    import docker

    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"{CONTAINER_LABEL}={run}"}):
        container.stop(timeout=seconds)


@contextmanager
def _replaced(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace functions of modules and classes for a block."""
    originals = [(place, name, vars(place)[name]) for place, name, _ in patches]
    try:
        for place, name, replacement in patches:
            setattr(place, name, replacement)
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


@contextmanager
def _handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that stop a run, for a block."""
    former = {}
    # Only the main thread may do this.
    for number in _SIGNALS if threading.current_thread() is threading.main_thread() else ():
        # Under nohup, a terminal that closes is to be ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in former.items():
            signal.signal(number, earlier)
