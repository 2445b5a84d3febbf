"""Each step, killed or stopped at drawn moments and run again, leaves what an undisturbed run leaves."""

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

from tests.faults.steps import STEPS, command_of, content


def _environment(out: Path) -> dict[str, str]:
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db", "KFP_RUN_ID": "the-run"}
    return {**os.environ, **tracking, "TMPDIR": str(out / "tmp"), "XDG_CACHE_HOME": str(out / "cache")}


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], float]]:
    """Content and duration of every step's own result."""
    results = {}
    for step, (_, result) in STEPS.items():
        out = tmp_path_factory.mktemp(step)
        (out / "tmp").mkdir()
        started = time.monotonic()
        subprocess.run(command_of(step, inputs, out), check=True, env=_environment(out), capture_output=True)
        results[step] = (content(out / result), time.monotonic() - started)
    return results


def _interrupted(command: list[str], environment: dict[str, str], seconds: float, number: signal.Signals) -> None:
    """Kill all of a step's processes, as a node's end does, or stop its first one, as Kubernetes does."""
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


def _left_behind(environment: dict[str, str]) -> list[psutil.Process]:
    """Processes of an interrupted step that have not ended ten seconds later."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == environment["TMPDIR"]
        except psutil.Error:
            return False

    _, alive = psutil.wait_procs([process for process in psutil.process_iter() if belongs(process)], timeout=10)
    return list(alive)


@pytest.mark.faults_only
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_died_is_repaired_by_running_it_again(
    step: str,
    number: signal.Signals,
    inputs: Path,
    undisturbed: dict[str, tuple[dict[str, bytes], float]],
    tmp_path_factory: pytest.TempPathFactory,
    moments: int,
) -> None:
    wanted, seconds = undisturbed[step]
    draw = random.Random(f"{step} {number}")
    for _ in range(moments):
        out = tmp_path_factory.mktemp("killed")
        (out / "tmp").mkdir()
        command, environment = command_of(step, inputs, out), _environment(out)
        _interrupted(command, environment, draw.uniform(0.2, 1.0) * seconds, number)
        assert not _left_behind(environment)
        if number == signal.SIGTERM:
            assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "what was begun is left"
        result = out / STEPS[step][1]
        if result.exists() and step != "evaluate":
            assert content(result) == wanted, "something half-written is visible"
        again = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert content(result) == wanted
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
    wanted, seconds = undisturbed["train"]
    for schedule in range(moments):
        draw = random.Random(schedule)
        out = tmp_path_factory.mktemp("interrupted")
        (out / "tmp").mkdir()
        command, environment = command_of("train", inputs, out), _environment(out)
        for _ in range(draw.randint(2, 4)):
            number = draw.choice([signal.SIGKILL, signal.SIGTERM])
            _interrupted(command, environment, draw.uniform(0.4, 1.0) * seconds, number)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert content(out / "adapter") == wanted, f"schedule {schedule}"
