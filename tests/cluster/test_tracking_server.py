"""What the commands read from a profile's MLflow, and end there for runs that no step ends any more."""

import base64
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from minicpmv_finetune import environment
from minicpmv_finetune.kubeflow.profile import load_profile
from minicpmv_finetune.kubeflow.tracking_server import use_tracking
from minicpmv_finetune.tracking.step_runs import open_step_run, step_run
from tests.cluster.commands import INPUTS, ROOT, Command
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.cluster.fake_kubernetes import FakeKubernetes

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def _states(run_id: str) -> dict[str, str]:
    """The status in MLflow of each run of a pipeline run."""
    client = MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == environment.EXPERIMENT.default]
    found = client.search_runs([experiment.experiment_id], f"tags.`minicpmv.pipeline_run` = '{run_id}'")
    return {run.data.tags["minicpmv.task"]: run.info.status for run in found}


def test_a_run_without_a_last_step_is_ended_in_mlflow(
    kubeflow: FakeKubeflow,
    command: Command,
    database: Path,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cancelled = str(command("submit", *INPUTS, "--output", "json").json["run_id"])
    elsewhere, killed, going = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
    for run_id in (cancelled, elsewhere, killed, going):
        kubeflow.runs[run_id] = {**kubeflow.runs[cancelled], "run_id": run_id}
        monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, run_id)
        with step_run("validate-data"):
            pass
        open_step_run("train")  # and nobody finishes it
    ended = {"pipeline": "KILLED", "train": "KILLED", "validate-data": "FINISHED"}
    assert command("cancel", cancelled, "--dry-run").code == 0
    assert _states(cancelled)["pipeline"] == "RUNNING"
    assert command("cancel", cancelled).code == 0
    assert _states(cancelled) == ended
    history = [{"state": "CANCELING"}, {"state": "FAILED"}]
    kubeflow.runs[elsewhere].update(state="FAILED", state_history=history)
    assert command("runs", elsewhere).code == 0
    assert _states(elsewhere) == ended
    kubeflow.runs[killed].update(state="FAILED")
    clean = ("gc", "--root", f"{s3_uri}/pipelines", "--output", "json")
    assert command(*clean, "--dry-run").code == 0
    assert _states(killed)["pipeline"] == "RUNNING"
    assert command(*clean, "--delete").code == 0
    assert _states(killed) == {**ended, "pipeline": "FAILED"}
    assert _states(going) == {**ended, "pipeline": "RUNNING", "train": "RUNNING"}


def test_one_sentence_says_that_mlflow_is_not_reachable(kubeflow: FakeKubeflow, command: Command) -> None:
    run_id = command("submit", *INPUTS, "--output", "json").json["run_id"]
    done = command("cancel", run_id)
    assert done.code == 0
    assert done.err.count("MLflow may still list runs as running that are over") == 1
    assert "set MLFLOW_TRACKING_URI" in done.err


def test_credentials_are_those_of_the_profiles_secret(
    kubernetes_server: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(ROOT / "k8s" / "profiles" / "prod.yaml")
    keys = {"username": "somebody", "password": "hidden"}
    data: dict[str, Any] = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
    kubernetes_server.objects[f"/api/v1/namespaces/{profile.namespace}/secrets/minicpmv-mlflow"] = {"data": data}

    def read(name: str) -> str:
        return environment.Variable(name, "").read()

    assert use_tracking(profile)
    assert [read(USER), read(PASSWORD)] == ["somebody", "hidden"]
    assert read("MLFLOW_TRACKING_URI") == "http://mlflow.minicpmv-finetune:5000"
    # The password is for the profile's server, and for no other that the environment names.
    for name in (USER, PASSWORD):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere.example")
    assert use_tracking(profile)
    assert [read(USER), read(PASSWORD)] == ["", ""]
