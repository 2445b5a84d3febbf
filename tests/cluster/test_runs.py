"""`runs`, `logs` and `submit --wait` on runs that a real Kubeflow had: reasons from wherever they are to be found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune import storage
from minicpmv_finetune.kubeflow import client, runs
from minicpmv_finetune.kubeflow.profile import load_profile
from tests.cluster.commands import INPUTS, ROOT, Command
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.kubeflow.recorded import FOLDER, read, read_pods

NAMESPACE = "minicpmv-finetune"
MISTAKE = "s3://datasets/digits/none.json: nothing lies there; check the path or URI."
POD = "minicpmv-retrain-tmx4l-3208021936"
NO_LOG = (FOLDER / "log-not-found.json").read_text()

Recorded = Callable[..., str]


@pytest.fixture
def recorded(kubeflow: FakeKubeflow) -> Recorded:
    """A function that makes the server answer with a recorded run, and returns the run's id."""

    def answer(name: str, **change: Any) -> str:
        run = {**read(f"run-{name}"), **change}
        kubeflow.answer_next(f"GET /apis/v2beta1/runs/{run['run_id']}$", *[json.dumps(run)] * 4)
        return str(run["run_id"])

    return answer


@pytest.fixture
def in_kubernetes(
    kubeflow: FakeKubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """A function that gives the caller a kubeconfig, for a cluster with these pods and Workflows."""

    def connect(*pods: dict[str, Any], workflows: Any = None) -> dict[str, Any]:
        server = {"name": "fake", "cluster": {"server": kubeflow.url}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
        user = {"name": "fake", "user": {"token": "token"}}
        content = {"current-context": "fake", "contexts": [context], "clusters": [server], "users": [user]}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(content))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        space = f"/api/v1/namespaces/{NAMESPACE}"
        kubeflow.kubernetes[f"{space}/pods"] = {"items": list(pods)}
        kubeflow.kubernetes[f"/apis/argoproj.io/v1alpha1/namespaces/{NAMESPACE}/workflows"] = workflows or {"items": []}
        return kubeflow.kubernetes

    return connect


@pytest.fixture(autouse=True)
def no_kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def test_the_servers_log_names_the_mistake(kubeflow: FakeKubeflow, command: Command, recorded: Recorded) -> None:
    run_id = recorded("retrain-bad")
    kubeflow.answer_next(f"GET .*/nodes/{POD}/log", (FOLDER / "log-mistake.txt").read_text())
    rows = {row["step"]: row for row in command("runs", run_id, "--output", "json").json}
    assert rows["validate-data"] | {"pod_state": ""} == {
        "step": "validate-data",
        "state": "FAILED",
        "attempts": 1,
        "seconds": 100,
        "pod": POD,
        "pod_state": "",
        "message": MISTAKE,
    }
    assert rows["notify"]["message"] == ""


def test_a_log_is_read_from_the_archive_once_its_pod_is_gone(
    kubeflow: FakeKubeflow, command: Command, recorded: Recorded, s3_uri: str, profile: Callable[..., Path]
) -> None:
    run_id = recorded("retrain-bad")
    kubeflow.answer_next(r"GET .*/log", NO_LOG, NO_LOG)
    pod = "minicpmv-retrain-tmx4l-metadata-0-3-retry-system-container-impl-3208021936"
    folder = f"{s3_uri}/private-artifacts/{NAMESPACE}/minicpmv-retrain-tmx4l/2026/11/26/{pod}"
    storage.write_bytes(f"{folder}/main.log", (FOLDER / "log-mistake.txt").read_bytes())
    words = ("logs", run_id, "--profile", profile(pipeline_root=f"{s3_uri}/v2/artifacts"))
    done = command(*words)
    assert (done.code, done.out) == (0, f"error: {MISTAKE}\n"), done.err
    assert '"parameterValues"' in command(*words, "--raw").out


def test_the_launchers_copy_and_the_steps_marker_are_the_last_resorts(
    kubeflow: FakeKubeflow, command: Command, recorded: Recorded, s3_uri: str, profile: Callable[..., Path]
) -> None:
    run_id = recorded("retrain-bad")
    place = profile(pipeline_root=f"{s3_uri}/v2/artifacts")
    folder = f"{s3_uri}/v2/artifacts/minicpmv-retrain/{run_id}/validate-data/2e401fc0"
    storage.write_bytes(f"{folder}/permanent_error.json", json.dumps({"inputs": "", "message": MISTAKE}).encode())
    kubeflow.answer_next(r"GET .*/log", NO_LOG, NO_LOG, NO_LOG)
    assert command("runs", run_id, "--profile", place, "--output", "json").json[0]["message"] == MISTAKE
    record = json.dumps({"step": "validate-data", "sentence": "the record's", "exit_code": 75}).encode()
    storage.write_bytes(f"{s3_uri}/v2/artifacts/minicpmv-retrain/{run_id}/failed_steps/validate-data.json", record)
    kubeflow.answer_next(r"GET .*/log", NO_LOG, NO_LOG)
    rows = command("runs", run_id, "--profile", place, "--output", "json").json
    assert rows[0]["message"] == "the record's"
    done = command("logs", run_id, "--profile", place)
    assert done.code == 2
    for name in ("Kubernetes: there is no kubeconfig", "has no log of this pod", "the archive: nothing at"):
        assert name in done.err
    storage.write_bytes(f"{folder}/executor-logs-0", b"from the launcher\n")
    assert command("logs", run_id, "--profile", place).out == "from the launcher\n"


def test_kubernetes_says_why_a_pod_waits(command: Command, recorded: Recorded, in_kubernetes: Any) -> None:
    in_kubernetes(*read_pods().values())
    rows = {row["step"]: row for row in command("runs", recorded("waiting"), "--output", "json").json}
    assert {row["state"] for row in rows.values()} == {"PENDING"}
    assert "nvidia.com/gpu" in rows["gpu"]["message"]
    assert 'secret "not-there" not found' in rows["nosecret"]["message"]
    assert "nowhere.example/none:1 cannot be pulled" in rows["noimage"]["message"]


def test_without_a_kubeconfig_the_command_to_ask_kubernetes_is_named(command: Command, recorded: Recorded) -> None:
    for name in ("waiting", "out-of-memory"):
        run_id = recorded(name)
        shown = command("runs", run_id).out
        assert f"kubectl -n {NAMESPACE} describe pods -l pipeline/runid={run_id}" in shown


def test_what_kubernetes_did_to_a_pod_comes_before_its_log(
    kubeflow: FakeKubeflow, command: Command, recorded: Recorded, in_kubernetes: Any
) -> None:
    in_kubernetes(read_pods()["hungry"])
    (row,) = command("runs", recorded("out-of-memory"), "--output", "json").json
    assert "OOMKilled" in row["message"]
    assert "raise default.memory" in row["message"]
    assert not [line for line in kubeflow.requests if line.endswith("/log")]


def test_a_failed_attempt_is_reported_before_argo_decides(
    kubeflow: FakeKubeflow, command: Command, recorded: Recorded
) -> None:
    run = read("run-retrain-bad")
    tasks = run["run_details"]["task_details"]
    for task in tasks:
        if task["display_name"] in ("validate-data", "executor") and task["state"] == "FAILED":
            task.update(state="RUNNING", end_time="0001-01-01T00:00:00Z")
    run_id = recorded("retrain-bad", state="RUNNING", run_details={"task_details": tasks})
    kubeflow.answer_next(f"GET .*/nodes/{POD}/log", (FOLDER / "log-mistake.txt").read_text())
    row = command("runs", run_id, "--output", "json").json[0]
    assert (row["state"], row["message"]) == ("RUNNING", f"attempt 1 failed: {MISTAKE}")


def test_a_service_account_that_is_missing_is_named(command: Command, recorded: Recorded, in_kubernetes: Any) -> None:
    run_id = recorded("no-service-account")
    node = {
        "displayName": "root-driver(2)",
        "type": "Pod",
        "phase": "Error",
        "message": "error looking up service account kubeflow/minicpmv-finetune: not found",
    }
    workflow = {"metadata": {"labels": {"pipeline/runid": run_id}}, "spec": {}, "status": {"nodes": {"a": node}}}
    in_kubernetes(workflows={"items": [workflow]})
    (row,) = command("runs", run_id, "--output", "json").json
    assert row["step"] == "root-driver"
    assert "give the profile a service account that exists" in row["message"]


@pytest.mark.parametrize("evidence", ["history", "workflow"])
def test_a_cancelled_run_reads_canceled(
    evidence: str, kubeflow: FakeKubeflow, command: Command, recorded: Recorded, in_kubernetes: Any
) -> None:
    workflows = read("workflow-cancelled")
    states = ["RUNNING", *(["CANCELING"] if evidence == "history" else []), "FAILED"]
    run_id = workflows["items"][0]["metadata"]["labels"]["pipeline/runid"]
    history = [{"state": state} for state in states]
    if evidence == "workflow":
        in_kubernetes(workflows=workflows)
    recorded("training", run_id=run_id, state="FAILED", state_history=history)
    listed = {"runs": [{**read("run-training"), "run_id": run_id, "state": "FAILED", "state_history": history}]}
    kubeflow.answer_next(r"GET /apis/v2beta1/runs$", json.dumps(listed))
    assert command("runs", "--output", "json").json[0]["state"] == "CANCELED"
    assert "has finished or is stopping (CANCELED)" in command("cancel", run_id).out
    steps = command("runs", run_id, "--output", "json").json
    assert [row["state"] for row in steps] == ["SUCCEEDED", "SUCCEEDED", "CANCELED"]


def test_wait_says_cancelled_for_a_run_that_was_stopped(kubeflow: FakeKubeflow, command: Command) -> None:
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", json.dumps({"state": "CANCELING"}))
    kubeflow.outcomes["validate-data"] = "FAILED"
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.code == 1
    assert ": cancelled; " in done.out


def test_wait_says_once_why_a_pod_waits(
    command: Command, kubeflow: FakeKubeflow, in_kubernetes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_PATIENCE_SECONDS", 0)
    in_kubernetes(*read_pods().values())
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", *[json.dumps(read("run-waiting"))] * 2)
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.err.count("gpu: no node has enough nvidia.com/gpu") == 1
    assert "noimage: its container image nowhere.example/none:1 cannot be pulled" in done.err


def test_wait_names_the_command_that_shows_why_a_pod_waits(
    command: Command, kubeflow: FakeKubeflow, in_kubernetes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_PATIENCE_SECONDS", 0)
    waiting = [json.dumps(read("run-waiting"))] * 2
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", *waiting)
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.err.count("there is no kubeconfig here; see `kubectl -n minicpmv-finetune describe pods") == 1
    in_kubernetes()
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", *waiting)
    done = command("submit", *INPUTS, "--wait", "--poll", "0")
    assert done.err.count("namespace minicpmv-finetune has no pod of this run; see `kubectl") == 1


def test_a_run_without_tasks_is_not_no_runs(command: Command, recorded: Recorded) -> None:
    run_id = recorded("waiting", run_details=None, state="PENDING")
    shown = command("runs", run_id).out
    assert "no step has started yet; a pod has not started yet: Kubeflow does not say why" in shown
    assert "no runs" not in shown
    assert command("runs", recorded("waiting", run_details=None), "--output", "json").json == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({}, "Argo's controller has not taken it up"),
        ({"message": "postponed because too many workflows are running."}, "begun: postponed because too many"),
    ],
)
def test_a_run_that_nobody_takes_up_is_explained(
    status: dict[str, Any],
    reason: str,
    command: Command,
    kubeflow: FakeKubeflow,
    in_kubernetes: Any,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "_PATIENCE_SECONDS", 0)
    run_id = recorded("waiting", run_details=None, state="PENDING")
    in_kubernetes(workflows={"items": [{"metadata": {"labels": {"pipeline/runid": run_id}}, "status": status}]})
    assert reason in command("runs", run_id).out
    waiting = {**read("run-waiting"), "run_details": None, "state": "PENDING"}
    kubeflow.answer_next(r"GET /apis/v2beta1/runs/", *[json.dumps(waiting)] * 2)
    assert command("submit", *INPUTS, "--wait", "--poll", "0").err.count(reason) == 1


def test_where_pods_are_gone_the_log_is_named(command: Command, recorded: Recorded, in_kubernetes: Any) -> None:
    in_kubernetes()
    run_id = recorded("sdk-doc")
    assert f"an hour after its end; see `minicpmv-finetune logs {run_id}`" in command("runs", run_id).out


def test_retry_starts_the_failed_steps_again(kubeflow: FakeKubeflow, command: Command, recorded: Recorded) -> None:
    run_id = recorded("retrain-bad")
    kubeflow.answer_next(f"POST /apis/v2beta1/runs/{run_id}:retry", "{}")
    assert "would be started again" in command("runs", "--retry", run_id, "--dry-run").out
    assert not [line for line in kubeflow.requests if line.startswith("POST")]
    assert command("runs", "--retry", run_id, "--output", "json").json["changed"] is True
    assert f"POST /apis/v2beta1/runs/{run_id}:retry" in kubeflow.requests
    recorded("digits-1")
    refused = command("runs", "--retry", read("run-digits-1")["run_id"])
    assert (refused.code, "only a run that failed" in refused.err) == (2, True)
    assert command("runs", "--retry").code == 2


def test_the_progress_of_several_nodes_is_shown_where_trainer_knows_it(
    command: Command, recorded: Recorded, in_kubernetes: Any
) -> None:
    objects = in_kubernetes()
    # As Trainer 2.3 gave it, from transformers' own callback.
    metrics = {"loss": "0.12395323647393121", "grad_norm": "1.5425218343734741", "current_step": "41"}
    status = {
        "estimatedRemainingSeconds": 115,
        "lastUpdatedTime": "2026-11-26T19:37:55Z",
        "metrics": [{"name": name, "value": value} for name, value in metrics.items()],
        "progressPercentage": 42,
    }
    path = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
    objects[path] = {"items": [{"status": {"trainerStatus": status}}]}
    rows = command("runs", recorded("training"), "--output", "json").json
    assert rows[-1]["message"] == "42 %, loss 0.124, 1 min left"


def test_no_link_has_an_address_that_only_the_cluster_knows(
    kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = command("submit", *INPUTS, "--output", "json").json["run_id"]
    assert command("runs", "--output", "json").json[0]["link"] == f"{kubeflow.url}/#/runs/details/{run_id}"
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.delenv("KF_PIPELINES_UI_ENDPOINT", raising=False)
    monkeypatch.setattr(client, "reachable", lambda address: kubeflow.url)  # a port-forward of the command's own
    done = command("runs", "--output", "json")
    assert done.json[0]["link"] == ""
    assert done.err.count("set KF_PIPELINES_UI_ENDPOINT to the address at which you open Kubeflow's UI") == 1
    dev = load_profile(ROOT / "k8s" / "profiles" / "dev.yaml")
    assert client.connect(dev).where(run_id).startswith(f"run {run_id} (for links, set KF_PIPELINES_UI_ENDPOINT")
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/")
    assert command("runs", "--output", "json").json[0]["link"] == f"https://kubeflow.example/#/runs/details/{run_id}"
