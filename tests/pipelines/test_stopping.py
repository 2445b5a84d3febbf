"""A run that was stopped or has failed goes on with its finished steps; with small steps, by kfp.local as always."""

import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from minicpmv_finetune.pipelines import local, step_servers
from minicpmv_finetune.pipelines.local import _link, _link_results, run_pipeline
from minicpmv_finetune.pipelines.local_steps import RunSteps
from minicpmv_finetune.pipelines.pipeline import Pipeline
from minicpmv_finetune.pipelines.run_display import RunDisplay
from minicpmv_finetune.pipelines.run_folder import RunFolder


@dsl.component(base_image="python:3", install_kfp_package=False)
def prepare(folder: str, made: dsl.Output[dsl.Artifact]) -> None:
    """Make something, and count how often."""
    from pathlib import Path

    with (Path(folder) / "prepared").open("a") as file:
        file.write("x")
    Path(made.path).write_text("made")
    print("→ prepared well")


@dsl.component(base_image="python:3", install_kfp_package=False)
def use(folder: str, made: dsl.Input[dsl.Artifact]) -> None:
    """Do what a file says."""
    import subprocess
    import sys

    subprocess.run([sys.executable, f"{folder}/use.py", made.path], check=True)


def _add_tasks(inputs: Mapping[str, Any], partitions: int) -> None:
    prepared = prepare(folder=inputs["data_uri"])
    use(folder=inputs["data_uri"], made=prepared.outputs["made"])


@pytest.fixture(params=[False, True], ids=["interpreters", "forks"])
def forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the steps are forks of a server."""
    monkeypatch.setattr(local, "_may_fork", lambda *_: request.param)
    monkeypatch.setattr(step_servers, "FIRST_IMPORTS", ["kfp.dsl.executor_main"])
    monkeypatch.setattr(step_servers, "TORCH_IMPORTS", [])
    return bool(request.param)


@pytest.fixture
def pipeline(forks: bool, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    from minicpmv_finetune.inputs.table import rows

    monkeypatch.setattr(RunSteps, "end_tracking", lambda steps, status: None)
    return Pipeline("small", "Small", "Two steps.", ("prepare", "use"), rows("data_uri"), _add_tasks)


def attempt(tmp_path: Path, pipeline: Pipeline, behavior: str, **options: Any) -> int:
    """Run the pipeline, and return its exit code."""
    (tmp_path / "use.py").write_text(behavior)
    try:
        run_pipeline(tmp_path / "out", {"data_uri": str(tmp_path)}, pipeline=pipeline, **options)
    except SystemExit as end:
        return int(str(end.code))
    return 0


STOP = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"


def test_the_same_command_goes_on_with_the_finished_steps(
    tmp_path: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(tmp_path, pipeline, "1 / 0") == 1
    failed = capsys.readouterr()
    assert "the same command goes on with the finished steps; --fresh starts over" in failed.out
    started = time.monotonic()
    assert attempt(tmp_path, pipeline, STOP) == 128 + signal.SIGINT
    assert time.monotonic() - started < 30
    stopped = capsys.readouterr().out
    assert "stopping: use" in stopped
    assert "use was stopped; " in stopped
    assert "the same command goes on from there, and --fresh starts over" in stopped
    assert attempt(tmp_path, pipeline, "print('done')") == 0
    finished = capsys.readouterr().out
    assert "going on with the unfinished run small-" in finished
    assert re.search(r"prepared well +reused\n", finished)
    assert (tmp_path / "prepared").read_text() == "x"
    assert (tmp_path / "out" / "run.log").read_text().count("==== small-") == 3


def test_a_step_is_a_fork_where_that_is_possible(tmp_path: Path, pipeline: Pipeline, forks: bool) -> None:
    starter = "psutil.Process().parent().parent()"  # of the step, whose process starts use.py
    assert attempt(tmp_path, pipeline, f"import psutil; print('started by', {starter}.name())") == 0
    started_by = re.search(r"started by (\S+)", (tmp_path / "out" / "run.log").read_text())
    assert started_by
    assert (started_by[1] != "sh") is forks


def test_fresh_begins_again_and_removes_the_unfinished_run(
    tmp_path: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(tmp_path, pipeline, "1 / 0") == 1
    assert attempt(tmp_path, pipeline, "print('done')", fresh=True) == 0
    assert "Removed" in capsys.readouterr().out
    assert (tmp_path / "prepared").read_text() == "xx"
    assert len(list((tmp_path / "out" / "artifacts").glob("small-*"))) == 1


def test_the_link_to_a_report_leads_to_a_file_that_a_browser_takes_for_a_page(tmp_path: Path) -> None:
    run = tmp_path / "artifacts" / "run"
    for content in ("first", "second"):
        (run / "evaluate").mkdir(parents=True, exist_ok=True)
        (run / "evaluate" / "evaluation_report").write_text(content)
        _link_results(tmp_path, run, ["report.html", "model"])
        assert (tmp_path / "report.html").resolve().name == "evaluation_report.html"
        assert (tmp_path / "report.html").read_text() == content
    (run / "merge" / "model").mkdir(parents=True)
    _link_results(tmp_path, run, ["model"])
    assert (tmp_path / "model").resolve() == (run / "merge" / "model").resolve()


def test_a_link_to_a_result_replaces_links_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        _link(tmp_path / "model", tmp_path / name)
        assert (tmp_path / "model").readlink() == Path(name)
    (tmp_path / "model").unlink()
    (tmp_path / "model").mkdir()  # by a user, while the run works
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / ".report.html").write_text("mine")
    for name in ("model", "report.html"):
        _link(tmp_path / name, tmp_path / "second")
        assert f"{tmp_path / name} was put there by something else" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".report.html", "first", "model", "report.html", "second"}
    assert (tmp_path / "report.html").read_text() == (tmp_path / ".report.html").read_text() == "mine"


def test_all_mistakes_that_a_step_names_are_shown() -> None:
    display = RunDisplay(StringIO())
    display.stream.write("error: 2 inputs are wrong.\n- lora_r: 0 is too small.\n- seed: -1 is too small.\n- ")
    assert display.error == "2 inputs are wrong. lora_r: 0 is too small. seed: -1 is too small."


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command of a step without inputs, as kfp.local makes it."""
    (tmp_path / "train").mkdir()
    outputs = {"outputFile": str(tmp_path / "train" / "executor_output.json")}
    return ["sh", "--executor_input", json.dumps({"inputs": {}, "outputs": outputs})]


def test_no_step_begins_after_a_signal(tmp_path: Path, command: list[str]) -> None:
    steps = RunSteps(RunFolder(tmp_path, "", goes_on=False), RunDisplay(StringIO()), lock=0)
    with steps.in_charge():
        os.kill(os.getpid(), signal.SIGTERM)
        assert steps._run(command, lambda step: sys.exit(f"{step} began")) == 1
    assert steps.stopped_by == signal.SIGTERM


def test_a_finished_step_is_not_run_in_a_container_again(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []

    def run_container(image: str, **options: Any) -> int:
        images.append(image)
        return 0

    handler = importlib.import_module("kfp.local.docker_task_handler")
    monkeypatch.setattr(handler, "run_docker_container", run_container)
    steps = RunSteps(RunFolder(tmp_path, "", goes_on=False), RunDisplay(StringIO()), lock=0, in_containers=True)
    with steps.in_charge():
        for _ in range(2):
            assert handler.run_docker_container(client=None, image="trainer", command=command, volumes={}) == 0
    assert images == ["trainer"]
