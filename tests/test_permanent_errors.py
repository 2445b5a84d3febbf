import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.permanent_errors import MARKER_NAME, permanent_error_marked

INPUTS = {"data_uri": "train.json", "ratio": 0.05}


def run_task(output_uri: str, error: Exception | None, inputs: Mapping[str, object] = INPUTS) -> bool:
    """Run a component's body that fails with `error`; returns True if it ran to its end."""
    with permanent_error_marked(output_uri, inputs):
        if error:
            raise error
        return True


def exit_code(output_uri: str, error: Exception | None, inputs: Mapping[str, object] = INPUTS) -> int | str | None:
    """The exit code with which a task ends the process."""
    with pytest.raises(SystemExit) as raised:
        run_task(output_uri, error, inputs)
    return raised.value.code


@pytest.fixture(params=["folder", "s3"])
def output_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    base = str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_uri")
    return storage.join(base, "run/task/dataset")


def test_a_retry_after_a_mistake_ends_at_once(output_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(output_uri, UserError("train.json: not found.")) == 2
    assert capsys.readouterr().err == "error: train.json: not found.\n"
    assert exit_code(output_uri, None) == 2, "the body ran"
    assert capsys.readouterr().err == "error: train.json: not found.\n"


def test_the_marker_is_stored_beside_the_output(output_uri: str) -> None:
    exit_code(output_uri, UserError("sentence"))
    marker = json.loads(storage.read_bytes(storage.join(storage.parent(output_uri), MARKER_NAME)))
    assert marker["message"] == "sentence"


def test_a_marker_of_other_inputs_is_ignored(output_uri: str) -> None:
    exit_code(output_uri, UserError("sentence"))
    assert run_task(output_uri, None, {**INPUTS, "ratio": 0.5})
    assert exit_code(output_uri, None, dict(reversed(INPUTS.items()))) == 2  # the order of inputs does not matter


def test_a_temporary_fault_leaves_no_marker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output_uri = str(tmp_path / "dataset")
    assert exit_code(output_uri, RetryableError("the store does not answer.")) == 75
    assert "the store does not answer" in capsys.readouterr().err
    assert run_task(output_uri, None)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback_and_leaves_no_marker(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_task(str(tmp_path / "dataset"), ZeroDivisionError())
    assert not list(tmp_path.iterdir())


def test_a_damaged_marker_is_ignored(tmp_path: Path) -> None:
    (tmp_path / MARKER_NAME).write_text("{")
    assert run_task(str(tmp_path / "dataset"), None)


def test_without_access_to_the_store_the_step_runs_and_keeps_its_sentence(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    assert run_task(f"{s3_uri}/dataset", None)
    assert exit_code(f"{s3_uri}/dataset", UserError("sentence")) == 2
    assert capsys.readouterr().err == "error: sentence\n"
