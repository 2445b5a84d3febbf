import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RetryableError, SentenceExit, StoppedError, UserError
from minicpmv_finetune.permanent_errors import MARKER_NAME, permanent_error_marked
from minicpmv_finetune.run_records import FailedStep, read_failed_steps

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


@pytest.fixture(autouse=True)
def second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Argo sets when it starts a pod again."""
    monkeypatch.setenv(environment.RETRY_INDEX.name, "1")


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


@pytest.mark.parametrize("index", ["0", "", None])
def test_an_attempt_that_a_person_starts_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str | None
) -> None:
    output_uri = str(tmp_path / "dataset")
    exit_code(output_uri, UserError("train.json: not found."))
    monkeypatch.delenv(environment.RETRY_INDEX.name)
    if index is not None:
        monkeypatch.setenv(environment.RETRY_INDEX.name, index)  # as recorded: a person's retry has 0
    assert run_task(output_uri, None)
    assert not list(tmp_path.iterdir()), "the old sentence is still there"


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (UserError("train.json: not found."), "train.json: not found.", 2),
        (RetryableError("the store does not answer."), "the store does not answer.", 75),
        (SentenceExit(137, "process 0 was killed."), "process 0 was killed.", 137),
        (KeyError("x"), "KeyError: 'x'; see the step's log", 1),
    ],
)
def test_why_a_step_failed_is_at_the_root_of_its_run_until_it_starts_again(
    output_uri: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, sentence: str, code: int
) -> None:
    # As Kubeflow stores artifacts: <root>/<pipeline>/<run>/<task>/<execution>/<artifact>.
    root = storage.join(storage.parent(storage.parent(output_uri)), "run-7")
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    monkeypatch.setenv(environment.RETRY_INDEX.name, "0")
    artifact = storage.join(root, "train/execution/adapter")
    with pytest.raises((SystemExit, KeyError)), permanent_error_marked(artifact, INPUTS):
        raise error
    assert read_failed_steps(root) == [FailedStep(step="train", sentence=sentence, exit_code=code)]
    assert run_task(artifact, None)
    assert not read_failed_steps(root)


def test_a_signal_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, tmp_path.name)
    assert exit_code(str(tmp_path / "train/adapter"), StoppedError("stopped by SIGTERM.")) == 75
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("content", ["{", "[]", '{"message": "of other inputs"}'])
def test_a_damaged_marker_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / MARKER_NAME).write_text(content)
    assert run_task(str(tmp_path / "dataset"), None)


def test_without_access_to_the_store_the_step_runs_and_keeps_its_sentence(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    assert run_task(f"{s3_uri}/dataset", None)
    assert exit_code(f"{s3_uri}/dataset", UserError("sentence")) == 2
    assert capsys.readouterr().err == "error: sentence\n"


def test_parts_that_run_side_by_side_have_a_record_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    root = str(tmp_path / "run-7")

    def end(part: int, error: Exception | None) -> None:
        # Kubeflow gives every part a folder of its own, below one for the step.
        place = storage.join(root, f"preprocess-part/execution-{part}/place")
        with suppress(SystemExit), permanent_error_marked(place, {"part": part}, f"preprocess-part[{part}]"):
            if error:
                raise error

    def sentences() -> dict[str, str]:
        return {failed.step: failed.sentence for failed in read_failed_steps(root)}

    end(0, UserError("part 0's."))
    end(1, RetryableError("part 1's."))
    end(2, None)
    assert sentences() == {"preprocess-part[0]": "part 0's.", "preprocess-part[1]": "part 1's."}
    assert sorted(storage.list_files(f"{root}/failed_steps")) == ["preprocess-part-0.json", "preprocess-part-1.json"]
    end(1, None)
    assert sentences() == {"preprocess-part[0]": "part 0's."}
