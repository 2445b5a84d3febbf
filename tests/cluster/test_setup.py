"""From "I have Kubeflow" to the last lines of a run: `setup`, the notebook, and the result of `submit --wait`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import yaml

from minicpmv_finetune import storage
from minicpmv_finetune.kubeflow import kubernetes_access
from tests.cluster.commands import BASE_MODEL, INPUTS, Command
from tests.cluster.conftest import KEYS, make_namespace
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.cluster.fake_kubernetes import FakeKubernetes


def test_setup_prints_what_is_missing_and_applies_it(stock: FakeKubernetes, command: Command) -> None:
    words = ("setup", "--profile", "kubeflow", "--registry", "registry.example.com/me")
    before = command(*words)
    assert before.code == 2
    assert "FAILED  MLflow: there is no Service mlflow in kubeflow" in before.out
    assert before.out.count("FAILED") == 1, before.out
    assert not [line for line in stock.requests if not line.startswith("GET ")]
    assert command(*words, "--apply").code == 0
    deployment = stock.objects["/apis/apps/v1/namespaces/kubeflow/deployments/mlflow"]
    pod = deployment["spec"]["template"]
    container = pod["spec"]["containers"][0]
    variables = {item["name"]: item.get("value") or item["valueFrom"] for item in container["env"]}
    assert container["image"].startswith("registry.example.com/me/data:")
    assert pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    assert variables["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlpipeline/v2/artifacts/minicpmv-mlflow"
    assert variables["AWS_SECRET_ACCESS_KEY"] == {
        "secretKeyRef": {"name": "mlpipeline-minio-artifact", "key": "secretkey"}
    }
    again = command(*words, "--apply")
    assert again.code == 0
    assert "MLflow: found at http://mlflow.kubeflow:5000" in again.out
    for setting in ("REGISTRY=registry.example.com/me", "MLFLOW=http://mlflow.kubeflow:5000"):
        assert f"MINICPMV_FINETUNE_{setting}" in again.out
    assert "TOKEN" not in again.out


def test_setup_for_several_users_prints_the_command_for_a_token(
    stock: FakeKubernetes, kubeflow: FakeKubeflow, s3_server: dict[str, str], command: Command
) -> None:
    kubeflow.tokens["mine"] = {"team-a"}
    make_namespace(stock, "team-a", "default-editor", "minio://mlpipeline/private-artifacts/team-a", s3_server)
    done = command("setup", "--profile", "kubeflow-profile", "--namespace", "team-a", "--apply")
    assert 'export KF_PIPELINES_TOKEN="$(kubectl -n team-a create token default-editor ' in done.out
    assert "--audience pipelines.kubeflow.org" in done.out
    assert "MINICPMV_FINETUNE_NAMESPACE=team-a" in done.out


def test_setup_needs_kubernetes(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    done = command("setup")
    assert done.code == 2
    assert "KUBECONFIG" in done.err


@pytest.fixture
def notebook(
    kubeflow: FakeKubeflow,
    kubernetes_server: FakeKubernetes,
    s3_server: dict[str, str],
    s3_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A Kubeflow notebook in a Profile's namespace: mounted tokens, names of Services resolve, no kubeconfig.

    Returns the profile of the package with the addresses of the servers on this machine.
    """
    root = f"minio://{s3_uri.removeprefix('s3://')}/private-artifacts/team-a/v2/artifacts"
    make_namespace(kubernetes_server, "team-a", "default-editor", root, s3_server)
    kubeconfig = str(tmp_path / "kubeconfig")

    def load_mounted(client_configuration: kubernetes.client.Configuration) -> None:
        kubernetes.config.load_kube_config(kubeconfig, client_configuration=client_configuration)

    monkeypatch.setattr(kubernetes.config, "load_incluster_config", load_mounted)
    monkeypatch.setattr(kubernetes_access, "_NAMESPACE_FILE", tmp_path / "namespace")
    (tmp_path / "namespace").write_text("team-a\n")
    (tmp_path / "token").write_text("mounted")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("AWS_ENDPOINT_URL", *KEYS.values(), "KF_PIPELINES_ENDPOINT", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    kubeflow.tokens["mounted"] = {"team-a"}
    shipped = Path(kubernetes_access.__file__).with_name("profiles") / "kubeflow-profile.yaml"
    content = yaml.safe_load(shipped.read_text())
    content["kubeflow_pipelines"]["endpoint"] = kubeflow.url
    content["s3"]["endpoint"] = s3_server["AWS_ENDPOINT_URL"]
    path = tmp_path / "profiles" / "kubeflow-profile.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("minicpmv_finetune.kubeflow.profile._SHIPPED", path.parent)
    return path


def test_the_same_commands_work_in_a_notebook(
    notebook: Path, kubeflow: FakeKubeflow, command: Command, s3_uri: str, tmp_path: Path
) -> None:
    data = tmp_path / "data" / "train.json"
    data.parent.mkdir()
    (data.parent / "one.png").write_bytes(b"image")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    data.write_text(json.dumps([{"image": "one.png", "conversations": turns}]))
    options = ("--profile", "kubeflow-profile")
    uploaded = command("upload", data, *options)
    assert uploaded.code == 0, uploaded.err
    uri = uploaded.out.strip()
    assert uri.startswith(f"{s3_uri}/private-artifacts/team-a/v2/artifacts/minicpmv-data/")
    inputs = ("-p", f"data_uri={uri}", "-p", f"base_model_uri={BASE_MODEL}")
    done = command("submit", *inputs, *options, "--wait", "--poll", "0")
    assert done.code == 0, done.err
    (experiment,) = kubeflow.experiments.values()
    (run,) = kubeflow.runs.values()
    assert (experiment["namespace"], run["service_account"]) == ("team-a", "default-editor")
    assert "kubectl" not in command("setup", *options).out


def test_wait_says_that_nothing_was_new(
    kubeflow: FakeKubeflow, command: Command, profile: Callable[..., Path], s3_uri: str
) -> None:
    words = (
        "submit",
        *INPUTS,
        "--pipeline",
        "retrain",
        "--name",
        "nightly",
        "--profile",
        profile(pipeline_root=s3_uri),
    )
    run_id = command(*words, "--output", "json").json["run_id"]
    sentence = "nothing new: version 3 of receipts was tuned on this data"
    _write(
        {
            f"{s3_uri}/minicpmv-retrain/{run_id}/outcome.json": json.dumps(
                {"result": "nothing new", "sentence": sentence}
            )
        }
    )
    assert f"nightly: succeeded, {sentence}; " in command(*words, "--wait", "--poll", "0").out


def test_wait_ends_with_score_report_and_version(
    kubeflow: FakeKubeflow, command: Command, profile: Callable[..., Path], s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = profile(pipeline_root=s3_uri)
    run_id = command("submit", *INPUTS, "--name", "monday", "--profile", settings, "--output", "json").json["run_id"]
    record = {
        "promote": True,
        "reason": "98.7 points better than the base model",
        "model_uri": "s3://bucket/model",
        "base_model": BASE_MODEL,
        "generation": "4.6",
        "data_fingerprint": "0",
        "metric": "exact_match",
        "metrics": {"tuned_exact_match": 0.9867, "base_exact_match": 0.0},
    }
    run = f"{s3_uri}/minicpmv-finetune/{run_id}"
    report = f"{run}/evaluate/5f0c/evaluation_report"
    _write({f"{run}/evaluate/5f0c/promotion_record": json.dumps(record), report: "<html>"})
    outcome = {"result": "promoted", "sentence": "version 3 of my_receipts is champion: it's better."}
    _write({f"{run}/outcome.json": json.dumps(outcome)})
    done = command("submit", *INPUTS, "--name", "monday", "--profile", settings, "--wait", "--poll", "0")
    lines = [line.split(maxsplit=1) for line in done.out.splitlines()[-5:]]
    assert dict(lines) == {
        "score": "exact_match 0.9867 (base model 0)",
        "gate": "passed, 98.7 points better than the base model",
        "report": report,
        "model": "s3://bucket/model",
        "version": "version 3 of my_receipts is champion: it's better",
    }


def _write(files: dict[str, Any]) -> None:
    for uri, content in files.items():
        storage.write_bytes(uri, content.encode())
