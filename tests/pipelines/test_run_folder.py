"""Which run a command goes on with, and which of its steps are reused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import claimed_folder
from minicpmv_finetune.pipelines.run_folder import (
    FINISHED_FILE,
    Step,
    inputs_digest,
    locked,
    open_run,
    remove_unfinished,
    unfinished_runs,
)


def test_the_last_unfinished_run_of_the_same_inputs_goes_on(tmp_path: Path) -> None:
    first, other = inputs_digest("p", {"a": 1}), inputs_digest("p", {"a": 2})
    assert first not in (other, inputs_digest("q", {"a": 1}))
    begun = open_run(tmp_path, "p", first)
    assert not begun.goes_on
    different = open_run(tmp_path, "p", other)
    assert different.path != begun.path
    marker = begun.path / "train" / "permanent_error.json"
    marker.parent.mkdir()
    marker.write_text("{}")
    assert open_run(tmp_path, "p", first).goes_on
    assert not marker.exists(), "the mistake may have been corrected"
    begun.finish()
    assert open_run(tmp_path, "p", first).path != begun.path, "a finished run is not done again in its folder"


def test_only_unfinished_runs_of_the_same_inputs_are_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "minicpmv-finetune-of-0.1.0" / "train").mkdir(parents=True)
    finished = open_run(tmp_path, "p", "1")
    finished.finish()
    unfinished, other = open_run(tmp_path, "p", "1"), open_run(tmp_path, "p", "2")
    remove_unfinished(tmp_path, "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["minicpmv-finetune-of-0.1.0", finished.path.name, other.path.name]
    )
    assert str(unfinished.path) in capsys.readouterr().out
    assert unfinished_runs(tmp_path, "1", others=True) == [other.path]


def command(folder: Path, name: str = "train", parameters: dict[str, Any] | None = None, code: str = "f") -> list[str]:
    step = folder / name
    document = {
        "inputs": {
            "parameterValues": parameters or {},
            "artifacts": {"shards": {"artifacts": [{"uri": str(folder / "shards")}]}},
        },
        "outputs": {
            "outputFile": str(step / "executor_output.json"),
            "artifacts": {"adapter": {"artifacts": [{"uri": str(step / "adapter")}]}},
            "parameters": {"Output": {"outputFile": str(step / "Output")}},
        },
    }
    return ["sh", "-c", code, "--executor_input", json.dumps(document), "--function_to_execute", name]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose steps train and validate-data are finished."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in ("train", "validate-data"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "weights").write_text("w")
        (tmp_path / name / "executor_output.json").write_text("{}")
        step = Step(command(tmp_path, name, {"base_model_uri": str(tmp_path / "base")}))
        step.finish(step.key(), "loss 1", 2.0)
    return tmp_path


def reused(run: Path, **changes: Any) -> bool:
    step = Step(command(run, **{"parameters": {"base_model_uri": str(run / "base")}, **changes}))
    return step.finished(step.key()) is not None


def test_a_finished_step_is_reused(run: Path) -> None:
    assert reused(run)


def test_validation_always_looks_at_the_data_again(run: Path) -> None:
    assert not reused(run, name="validate-data")


@pytest.mark.parametrize(
    "changes",
    [{"parameters": {"base_model_uri": "elsewhere"}}, {"code": "g"}, {"name": "merge"}],
    ids=["parameter", "code", "not begun"],
)
def test_a_step_that_was_made_from_something_else_is_done_again(run: Path, changes: dict[str, Any]) -> None:
    assert not reused(run, **changes)


@pytest.mark.parametrize(
    "file",
    ["shards/manifest.json", "base/config.json", "train/adapter/weights", "train/executor_output.json"],
)
@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_step_whose_inputs_or_outputs_changed_is_done_again(run: Path, file: str, is_deleted: bool) -> None:
    if is_deleted:
        (run / file).unlink()
    else:
        (run / file).write_text("changed")
    assert not reused(run)


def test_a_step_is_reused_after_the_one_before_it_has_written_the_same_again(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with claimed_folder(tmp_path / "shards", "preprocess", {}) as output, output.assembled() as staging:
            (staging / "manifest.json").write_text("{}")
        (tmp_path / "train").mkdir(exist_ok=True)
        step = Step(command(tmp_path))
        assert (step.finished(step.key()) is not None) == (attempt == "second")
        step.finish(step.key(), "loss 1", 2.0)


def test_a_new_attempt_does_not_find_what_a_failed_one_left_but_its_checkpoints(run: Path) -> None:
    kept = run / "train" / "checkpoints" / "checkpoint-3.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    (run / "train" / ".adapter.abc").mkdir()
    Step(command(run)).clear()
    left = {path.name for path in (run / "train").iterdir()}
    assert left == {"adapter", "checkpoints"}
    assert kept.exists()
    assert not (run / "train" / FINISHED_FILE).exists()


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicpmv_finetune.pipelines.run_folder._SECONDS_FOR_LOCK", 0)
    with locked(tmp_path) as lock:
        # A step that the run started keeps the lock when the run is killed.
        step = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1, pass_fds=(lock,))
    try:
        with pytest.raises(UserError, match=r"works in this folder; wait until it has ended, or give another --out"):
            locked(tmp_path).__enter__()
    finally:
        step.communicate()
    with locked(tmp_path):
        pass
