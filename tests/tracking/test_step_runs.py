"""The MLflow runs of pipeline runs and steps, with a database file and with servers that fail."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from minicpmv_finetune import environment
from minicpmv_finetune.tracking import step_runs
from minicpmv_finetune.tracking.step_runs import (
    StepRun,
    finish_pipeline_run,
    open_step_run,
    step_run,
)


def runs(experiment: str = environment.EXPERIMENT.default) -> dict[str, list[Run]]:
    """All runs of an experiment, by the run's name."""
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    assert found
    by_name: dict[str, list[Run]] = {}
    for run in client.search_runs([found.experiment_id]):
        by_name.setdefault(run.info.run_name, []).append(run)
    return by_name


def test_steps_are_nested_below_one_run(database: Path) -> None:
    for task in ("validate", "train"):
        with step_run(task) as run:
            run.log_parameters({"task": task, "rank": 8})
            run.log_metrics({"loss": 0.5}, step=3)
    finish_pipeline_run("FINISHED")
    found = runs()
    assert sorted(found) == ["pipeline-run-1", "train", "validate"]
    assert all(len(group) == 1 for group in found.values())
    (parent,), (train,) = found["pipeline-run-1"], found["train"]
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert train.data.params == {"task": "train", "rank": "8"}
    assert MlflowClient().get_metric_history(train.info.run_id, "loss")[0].step == 3
    assert {run.info.status for group in found.values() for run in group} == {"FINISHED"}


def test_the_pipelines_run_carries_the_headline(database: Path) -> None:
    with step_run("train") as run:
        run.log_headline({"loss": 0.25, "infinite": float("inf")}, {"lora_r": 16})
        run.log_headline({}, {"lora_r": 16})  # a retry
        run.log_headline({"score": 0.5})
    finish_pipeline_run("FINISHED")
    (parent,) = runs()["pipeline-run-1"]
    assert parent.data.metrics == {"loss": 0.25, "score": 0.5}
    assert parent.data.params == {"lora_r": "16"}


def test_every_run_names_the_commit(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.GIT_COMMIT.name, "a" * 40)
    with step_run("train"):
        pass
    assert {run.data.tags["mlflow.source.git.commit"] for group in runs().values() for run in group} == {"a" * 40}


def test_the_run_of_a_killed_step_is_closed_with_the_pipeline(database: Path) -> None:
    open_step_run("train")  # and nobody finishes it
    with step_run("validate-data"):
        pass
    finish_pipeline_run("FAILED")
    assert {name: group[0].info.status for name, group in runs().items()} == {
        "pipeline-run-1": "FAILED",
        "train": "KILLED",
        "validate-data": "FINISHED",
    }


def test_a_report_has_a_name_with_a_suffix(database: Path, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("<html>")
    with step_run("evaluate") as run:
        run.log_report(tmp_path / "report", "evaluation.html")
        run.log_report(tmp_path / "no report", "other.html")
    (evaluation,) = runs()["evaluate"]
    assert [item.path for item in MlflowClient().list_artifacts(evaluation.info.run_id)] == ["evaluation.html"]


@pytest.mark.parametrize("also", ["sys", "torch"])
def test_what_mlflow_leaves_out_can_be_imported_later_and_garbage_is_collected(also: str) -> None:
    child = (
        f"import gc, sys, {also}; from minicpmv_finetune.tracking.step_runs import import_mlflow\n"
        "import_mlflow(with_database=False)\n"
        "print('pandas' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "import pandas; pandas.DataFrame()"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", str(also != "torch")]


def test_mlflow_is_imported_with_pandas_where_a_release_needs_it() -> None:
    child = (
        "import sys\n"
        "class Needing:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'mlflow.entities': import pandas\n"
        "sys.meta_path.insert(0, Needing())\n"
        "from minicpmv_finetune.tracking.step_runs import import_mlflow\n"
        "import_mlflow(with_database=False)\n"
        "print('mlflow' in sys.modules, sys.modules['pandas'].DataFrame.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "DataFrame"]


class BrokenClient:
    """A client every call of which raises an error that MLflow does not announce."""

    def __getattr__(self, call: str) -> Callable[..., None]:
        def fail(*arguments: object, **named: object) -> None:
            raise AttributeError(f"{call} is broken")

        return fail


def test_no_call_raises_whatever_the_client_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report").write_text("<html>")
    run = StepRun(cast("MlflowClient", BrokenClient()), "a run", parent="its parent")
    run.log_parameters({"data": "half \ud800 of a pair"})
    run.log_metrics({"loss": 0.5})
    run.log_headline({"score": 0.5}, {"rank": 8})
    run.log_tags({"a": "b"})
    run.log_report(tmp_path / "report", "report.html")
    run.log_report(tmp_path / "report", "no/such/folder.html")
    assert run.last_step("loss") == -1
    run.finish("FINISHED")
    assert capsys.readouterr().err.count("MLflow tracking is incomplete: AttributeError") == 1


def test_a_metric_after_the_end_is_no_error(database: Path) -> None:
    with step_run("train") as run:
        run.log_metrics({"loss": 1.0})
    run.log_metrics({"loss": 0.5}, step=1)
    assert [metric.value for metric in run.unsent] == [0.5]


def test_a_retry_finds_its_run_again(database: Path) -> None:
    with pytest.raises(ZeroDivisionError), step_run("train") as run:
        run.log_metrics({"loss": 1 / 0})
    (failed,) = runs()["train"]
    assert failed.info.status == "FAILED"
    with step_run("train"):
        assert runs()["train"][0].info.status == "RUNNING"
    (finished,) = runs()["train"]
    assert finished.info.run_id == failed.info.run_id
    assert finished.info.status == "FINISHED"
    assert len(runs()["pipeline-run-1"]) == 1


def test_each_pipeline_run_has_its_own_step_runs(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pipeline_run in ("pipeline-run-1", "pipeline-run-2"):
        monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, pipeline_run)
        with step_run("train"):
            pass
    assert len(runs()["train"]) == 2


def test_a_step_outside_a_pipeline_has_no_parent(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.PIPELINE_RUN_ID.name)
    with step_run("train"):
        pass
    finish_pipeline_run("FINISHED")
    assert list(runs()) == ["train"]


def test_kubeflows_own_run_is_the_parent_without_parameters(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    plugin_run = client.create_run(client.create_experiment("of-kubeflow"), run_name="kubeflow")
    monkeypatch.setenv(environment.PLUGIN_RUN_ID.name, plugin_run.info.run_id)
    with step_run("train") as run:
        run.log_parameters({"rank": 8})
        run.log_headline({"score": 0.5}, {"lora_r": 8})
    finish_pipeline_run("FAILED")
    found = runs("of-kubeflow")
    assert sorted(found) == ["kubeflow", "train"]
    assert found["train"][0].data.tags["mlflow.parentRunId"] == plugin_run.info.run_id
    assert found["kubeflow"][0].data.params == {}
    assert found["kubeflow"][0].data.metrics == {"score": 0.5}
    assert found["kubeflow"][0].info.status == "RUNNING"


def test_files_are_stored_next_to_the_database(database: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("content")
    with step_run("evaluate") as run:
        run.log_file(str(report))
    (kept,) = database.parent.rglob("report.html")
    assert kept.read_text() == "content"
    assert not (tmp_path / "mlruns").exists()


def test_many_and_long_parameters_are_logged(database: Path) -> None:
    with step_run("train") as run:
        run.log_parameters({f"p{number}": "x" * 7000 for number in range(150)})
    assert run.failure == ""
    (train,) = runs()["train"]
    assert len(train.data.params) == 150


def test_without_an_address_nothing_is_tracked(
    database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(environment.TRACKING_URI.name)
    with step_run("train") as run:
        run.log_parameters({"rank": 8})
        run.log_metrics({"loss": 0.5})
        run.log_file("no such file")
    finish_pipeline_run("FINISHED")
    assert capsys.readouterr().err == ""


def test_a_failure_is_reported_at_the_end_and_does_not_stop_the_step(
    database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with step_run("train") as run:
        run.log_parameters({"rank": 8})
        run.log_parameters({"rank": 16})  # MLflow refuses to change a parameter
        run.log_file("no such file")
    message = capsys.readouterr().err
    assert message.count("MLflow tracking is incomplete") == 1
    assert "rank" in message
    (train,) = runs()["train"]
    assert (train.info.status, train.data.params) == ("FINISHED", {"rank": "8"})


def test_a_server_that_is_down_does_not_delay_a_step(
    database: Path, unreachable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, unreachable)
    started = time.monotonic()
    with step_run("train") as run:
        for step in range(100):
            run.log_metrics({"loss": 0.5}, step)
    finish_pipeline_run("FINISHED")
    assert time.monotonic() - started < 60
    assert capsys.readouterr().err.count("MLflow tracking is incomplete") == 2


def test_a_server_that_goes_down_later_does_not_delay_a_step(
    unreachable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run = StepRun(MlflowClient(unreachable), "run opened while it was up")
    started = time.monotonic()
    for step in range(100):
        run.log_metrics({"loss": 0.5}, step)
    run.finish("FINISHED")
    assert time.monotonic() - started < 60
    assert "Max retries exceeded" in capsys.readouterr().err


def test_metrics_of_an_outage_are_sent_when_the_server_is_back(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = open_step_run("train")
    run.log_metrics({"loss": 3.0}, step=1)
    client = run._client
    run._client = MlflowClient("http://127.0.0.1:9")  # no server listens there
    run.log_metrics({"loss": 2.0}, step=2)
    run.log_metrics({"loss": 1.0}, step=3)
    assert run._sending
    run._sending.result()
    assert [point.step for point in run.unsent] == [2, 3]
    run._client = client
    run.finish("FINISHED")
    assert run.run_id is not None
    assert client is not None
    assert [(point.step, point.value) for point in client.get_metric_history(run.run_id, "loss")] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]
    assert run.unsent == []
    assert run.last_step("loss") == 3


def test_a_database_appears_only_with_all_its_tables(tmp_path: Path) -> None:
    """Otherwise a step that is killed while MLflow creates the tables would leave a broken database to later steps."""
    place = tmp_path / "new" / "mlflow.db"
    child = (
        "import sqlite3, sys, threading, time\n"
        "from pathlib import Path\n"
        "from minicpmv_finetune.tracking.step_runs import mlflow_client\n"
        "place, seen = Path(sys.argv[1]), []\n"
        "def look():\n"
        "    while not place.exists():\n"
        "        time.sleep(0.001)\n"
        "    tables = sqlite3.connect(place).execute('select name from sqlite_master').fetchall()\n"
        "    seen.append(len(tables))\n"
        "watching = threading.Thread(target=look)\n"
        "watching.start()\n"
        "client = mlflow_client()\n"
        "watching.join()\n"
        "client.search_experiments()\n"
        "print(seen[0], len(sqlite3.connect(place).execute('select name from sqlite_master').fetchall()))\n"
    )
    variables = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{place}"}
    done = subprocess.run(
        [sys.executable, "-c", child, str(place)], env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, all_tables = done.stdout.split()
    assert int(first) == int(all_tables) > 20
    assert [path.name for path in place.parent.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    ("server", "named", "address"),
    [
        ("https://somebody:hidden@mlflow.example/", "", "https://mlflow.example"),
        ("http://mlflow.kubeflow:5000", "", ""),
        ("http://mlflow.kubeflow:5000", "https://mlflow.example", "https://mlflow.example"),
    ],
)
def test_pages_link_mlflow_where_a_browser_can_open_it(
    server: str, named: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.KUBERNETES_HOST.name, "10.0.0.1")
    monkeypatch.setenv(environment.TRACKING_URI.name, server)
    monkeypatch.setenv(environment.MLFLOW_UI.name, named)
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    found = SimpleNamespace(info=SimpleNamespace(run_id="0123"))
    for name, answer in (("mlflow_client", None), ("_experiment", "1"), ("_find", found)):
        monkeypatch.setattr(step_runs, name, lambda *arguments, answer=answer: answer)
    assert step_runs.browser_address() == address
    line = step_runs.link_to_run("train")
    if address:
        assert line == f"\n[This step in MLflow]({address}/#/experiments/1/runs/0123)\n"
    else:
        assert line.startswith("\nThis step in MLflow: run `0123` (for links, set `mlflow.ui_endpoint` in the profile")
