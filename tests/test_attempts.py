"""Which ends of a step are followed by another attempt, and where each is reported."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from minicpmv_finetune import environment
from minicpmv_finetune.attempts import run_step
from minicpmv_finetune.errors import RetryableError, SentenceExit, StoppedError, UserError
from minicpmv_finetune.tracking import step_runs

FAULT = RetryableError("the store does not answer.")


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of a step, which take no time."""
    waits: list[float] = []
    monkeypatch.setenv(environment.RETRY_WAITS.name, "10 20")
    monkeypatch.setattr("minicpmv_finetune.attempts.time.sleep", waits.append)
    return waits


@pytest.fixture
def runs(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Run]]:
    """The MLflow runs of one pipeline run, by their names."""
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv(environment.TRACKING_URI.name, f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")

    def read() -> dict[str, Run]:
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        experiment = client.get_experiment_by_name("minicpmv-finetune")
        assert experiment
        return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}

    return read


def attempt(uri: Path, ends: Sequence[BaseException | None]) -> tuple[int, int | str | None]:
    """The number of attempts at a step whose attempts end so, and its exit code."""
    made = 0

    def work() -> None:
        nonlocal made
        made += 1
        if error := ends[made - 1]:
            raise error

    try:
        run_step("train", str(uri / "run-7/train/adapter"), {}, work)
    except SystemExit as ended:
        return made, ended.code
    return made, 0


@pytest.mark.parametrize(
    ("ends", "attempts", "code", "waits"),
    [
        ([None], 1, 0, []),
        ([FAULT, None], 2, 0, [10.0]),
        ([FAULT, OSError(28, "No space left on device"), None], 3, 0, [10.0, 20.0]),
        ([FAULT, FAULT, FAULT], 3, 75, [10.0, 20.0]),
        ([UserError("train.json: not found.")], 1, 2, []),
        ([FAULT, UserError("train.json: not found.")], 2, 2, [10.0]),
        ([StoppedError("stopped by SIGTERM.")], 1, 75, []),
        ([SentenceExit(137, "killed.")], 1, 137, []),
    ],
)
def test_only_a_fault_is_followed_by_another_attempt(
    tmp_path: Path,
    waited: list[float],
    ends: list[BaseException | None],
    attempts: int,
    code: int,
    waits: list[float],
) -> None:
    assert attempt(tmp_path, ends) == (attempts, code)
    assert waited == waits


def test_a_fault_is_reported_in_the_log_and_in_mlflow(
    tmp_path: Path, runs: Callable[[], dict[str, Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(tmp_path, [FAULT, None])
    assert "warning: attempt 1 of 3: the store does not answer; again in 10 s\n" in capsys.readouterr().err
    assert runs()["train"].data.tags["minicpmv.fault.1"].startswith("attempt 1 of 3: the store does not answer")


def test_why_a_step_failed_is_on_the_page_of_its_run_and_of_the_pipelines(
    tmp_path: Path, runs: Callable[[], dict[str, Run]]
) -> None:
    attempt(tmp_path, [UserError("train.json: not found.")])
    step, whole = runs()["train"], runs()["run-7"]
    assert step.info.status == "FAILED"
    assert step.data.tags["mlflow.note.content"] == "train.json: not found."
    assert whole.data.tags["mlflow.note.content"] == "failed in train: train.json: not found."


def test_a_pipelines_run_that_has_ended_keeps_its_outcome_and_runs_again_with_the_next_step(
    tmp_path: Path, runs: Callable[[], dict[str, Run]]
) -> None:
    with step_runs.step_run("register"):
        step_runs.note_outcome("promoted", "version 3 is champion")
    step_runs.end_pipeline_run("FINISHED", "promoted", "version 3 is champion")
    attempt(tmp_path, [UserError("the webhook refuses.")])
    assert runs()["run-7"].info.status == "FINISHED"
    assert runs()["run-7"].data.tags["minicpmv.outcome"] == "version 3 is champion"
    with step_runs.step_run("register"):
        assert runs()["run-7"].info.status == "RUNNING"


@pytest.mark.parametrize("waits", ["soon", "-1", "inf", "nan"])
def test_waits_that_are_no_seconds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.RETRY_WAITS.name, waits)
    assert attempt(tmp_path, [None]) == (0, 2)
    assert environment.RETRY_WAITS.name in capsys.readouterr().err
