"""A step that is killed or stopped at random moments and run again has the result of an undisturbed run."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from minicpmv_finetune.outputs import FILES_MARK
from tests.faults.step_commands import STEP_SECONDS, STEPS, read_result, step_command


def _environment(out: Path) -> dict[str, str]:
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db", "KFP_RUN_ID": "pipeline-run-1"}
    return {**os.environ, **tracking, "TMPDIR": str(out / "tmp"), "XDG_CACHE_HOME": str(out / "cache")}


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], float]]:
    """The result of every step and the seconds that the step took."""
    results = {}
    for step, (_, result) in STEPS.items():
        out = tmp_path_factory.mktemp(step)
        (out / "tmp").mkdir()
        started = time.monotonic()
        subprocess.run(
            step_command(step, inputs, out),
            check=True,
            env=_environment(out),
            capture_output=True,
            timeout=STEP_SECONDS,
        )
        results[step] = (read_result(out / result), time.monotonic() - started)
    return results


def _interrupt(command: list[str], environment: dict[str, str], seconds: float, number: signal.Signals) -> None:
    """Kill all processes of a step, as the loss of a node does, or stop its first process, as Kubernetes does."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            descendants = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
            for victim in [process, *descendants]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(number)


def _find_leftovers(environment: dict[str, str]) -> list[psutil.Process]:
    """Processes of an interrupted step that are still alive half a minute later."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == environment["TMPDIR"]
        except psutil.Error:
            return False

    _, alive = psutil.wait_procs([process for process in psutil.process_iter() if belongs(process)], timeout=30)
    return list(alive)


@pytest.mark.faults_only
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("step", STEPS)
def test_running_an_interrupted_step_again_repairs_it(
    step: str,
    number: signal.Signals,
    inputs: Path,
    undisturbed: dict[str, tuple[dict[str, bytes], float]],
    tmp_path_factory: pytest.TempPathFactory,
    moments: int,
) -> None:
    expected, seconds = undisturbed[step]
    generator = random.Random(f"{step} {number}")
    for _ in range(moments):
        out = tmp_path_factory.mktemp("killed")
        (out / "tmp").mkdir()
        command, environment = step_command(step, inputs, out), _environment(out)
        _interrupt(command, environment, generator.uniform(0.2, 1.0) * seconds, number)
        assert not _find_leftovers(environment)
        if number == signal.SIGTERM:
            hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}
            assert hidden <= {FILES_MARK}, "an incomplete result is left"
        result = out / STEPS[step].result
        if result.exists() and step != "evaluate":
            # A folder that is claimed has a mark, and nothing else until the result is complete.
            assert read_result(result) in ({}, expected), "an incomplete result is visible"
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STEP_SECONDS)
        assert again.returncode == 0, again.stderr
        assert read_result(result) == expected
        assert not [path.name for path in out.iterdir() if path.name.endswith((".tmp", ".part"))]
        client = MlflowClient(f"sqlite:///{out}/mlflow.db")
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        names = [run.info.run_name for run in runs]
        assert len(names) == len(set(names)), "a step's run was opened twice"


@pytest.mark.faults_only
def test_any_schedule_of_interruptions_trains_the_same_adapter(
    inputs: Path,
    undisturbed: dict[str, tuple[dict[str, bytes], float]],
    tmp_path_factory: pytest.TempPathFactory,
    moments: int,
) -> None:
    expected, seconds = undisturbed["train"]
    for schedule in range(moments):
        generator = random.Random(schedule)
        out = tmp_path_factory.mktemp("interrupted")
        (out / "tmp").mkdir()
        command, environment = step_command("train", inputs, out), _environment(out)
        for _ in range(generator.randint(2, 4)):
            number = generator.choice([signal.SIGKILL, signal.SIGTERM])
            _interrupt(command, environment, generator.uniform(0.4, 1.0) * seconds, number)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STEP_SECONDS)
        assert done.returncode == 0, done.stderr
        assert read_result(out / "adapter") == expected, f"schedule {schedule}"
