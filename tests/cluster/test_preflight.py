"""`preflight` on a cluster that has everything, and with each requirement missing."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune.container_images import DATA_IMAGE
from minicpmv_finetune.kubeflow.checks import run_check
from minicpmv_finetune.kubeflow.installation import check_images
from minicpmv_finetune.kubeflow.preflight import _request
from minicpmv_finetune.kubeflow.profile import load_profile
from tests.cluster.commands import INPUTS, ROOT, Command
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.cluster.fake_kubernetes import FakeKubernetes

VERSION = DATA_IMAGE.rpartition(":")[2]
SPACE = "/api/v1/namespaces/minicpmv-finetune"
# As in objects/stock-configmaps.yaml of the recordings, and on a recorded Profile's namespace.
STOCK_CONTROLLER = {
    "data": {"workflowDefaults": "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}"}
}
PROFILE_LABELS = {"pipelines.kubeflow.org/enabled": "true", "app.kubernetes.io/part-of": "kubeflow-profile"}
CONTROLLER = "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"
GROUPS = {"queue": "kueue.x-k8s.io/v1beta2", "runtime": "trainer.kubeflow.org/v1alpha1"}


@pytest.fixture
def production(
    kubeflow: FakeKubeflow, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A function that writes the production profile, and a cluster that has everything that it names."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "current-context": "fake",
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "clusters": [{"name": "fake", "cluster": {"server": kubeflow.url}}],
                "users": [{"name": "fake", "user": {"token": "token"}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", kubeflow.url)
    kubeflow.tokens["mine"] = {"minicpmv-finetune"}
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "mine")
    monkeypatch.setenv("MINICPMV_FINETUNE_REGISTRY", "registry.example.com/team")
    node = {"metadata": {"name": "gpu"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}}
    custom = "namespaces/minicpmv-finetune"
    kubeflow.kubernetes.update(
        {
            SPACE: {"metadata": {"name": "minicpmv-finetune", "labels": PROFILE_LABELS}},
            f"{SPACE}/configmaps/kfp-launcher": {"data": {"defaultPipelineRoot": "", "providers": "s3: {}"}},
            CONTROLLER: STOCK_CONTROLLER,
            f"{SPACE}/secrets/minicpmv-s3": {"data": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}},
            f"{SPACE}/secrets/minicpmv-mlflow": {"data": {"username": "", "password": ""}},
            f"{SPACE}/serviceaccounts/minicpmv-finetune": {"metadata": {"name": "minicpmv-finetune"}},
            f"{SPACE}/persistentvolumeclaims/base-models": {"metadata": {"name": "base-models"}},
            "/api/v1/nodes": {"items": [node]},
            f"/apis/{GROUPS['queue']}/{custom}/localqueues/minicpmv-finetune": {"spec": {"clusterQueue": "gpu"}},
            f"/apis/{GROUPS['runtime']}/{custom}/trainingruntimes/minicpmv-finetune": {"spec": {}},
            "/version": "3.17.2",
        }
    )

    def write(**change: Any) -> Path:
        content = yaml.safe_load((ROOT / "k8s" / "profiles" / "prod.yaml").read_text())
        path = tmp_path / "prod.yaml"
        path.write_text(yaml.safe_dump({**content, "pipeline_root": f"{s3_uri}/pipelines", **change}))
        return path

    return write


def _states(command: Command, *words: str | Path) -> dict[str, tuple[str, str]]:
    done = command("preflight", *words, "--output", "json")
    return {check["name"]: (check["state"], check["detail"]) for check in done.json}


def test_no_check_fails_on_a_complete_cluster(
    production: Callable[..., Path], command: Command, s3_uri: str, s3_client: Any, tmp_path: Path
) -> None:
    bucket = s3_uri.removeprefix("s3://")
    s3_client.put_object(Bucket=bucket, Key="train.json", Body=b"[]")
    s3_client.put_object(Bucket=bucket, Key="model/config.json", Body=b"{}")
    before = s3_client.list_objects_v2(Bucket=bucket)["KeyCount"]
    words = ("--profile", production(), "--data", f"{s3_uri}/train.json", "--base-model", f"{s3_uri}/model")
    states = _states(command, *words)
    without_gpu = {"shared memory of merge", "shared memory of train"}  # the nodes of a training have the GPUs
    assert {name for name, (state, _) in states.items() if state != "ok"} == without_gpu
    assert "2.17.0" in states["Kubeflow Pipelines"][1]
    assert "3.17.2" in states["MLflow"][1]
    assert s3_client.list_objects_v2(Bucket=bucket)["KeyCount"] == before
    done = command("preflight", *words)
    assert done.code == 0
    assert len(done.out.splitlines()) == len(states)
    assert all(line.startswith(("ok ", "skipped ")) for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("path", "answer", "name", "state", "message"),
    [
        (f"{SPACE}/secrets/minicpmv-s3", 404, "Secret minicpmv-s3", "failed", "create it with the keys"),
        (f"{SPACE}/secrets/minicpmv-s3", 403, "Secret minicpmv-s3", "skipped", "no permission to read it"),
        (
            f"{SPACE}/secrets/minicpmv-mlflow",
            {"data": {"username": ""}},
            "Secret minicpmv-mlflow",
            "failed",
            "password",
        ),
        (f"{SPACE}/serviceaccounts/minicpmv-finetune", 404, "service account minicpmv-finetune", "failed", "overlay"),
        (f"{SPACE}/persistentvolumeclaims/base-models", 500, "claim base-models", "unreachable", "500"),
        ("/api/v1/nodes", {"items": []}, "GPUs of evaluate", "failed", "NVIDIA-H100"),
        (
            "/api/v1/nodes",
            {"items": [{"status": {"allocatable": {"cpu": "8"}}}]},
            "GPUs of evaluate",
            "failed",
            "offers any nvidia.com/gpu; add a node with its device plugin, correct node_selector in the profile, or "
            "run without by --gpus 0",
        ),
        (
            f"/apis/{GROUPS['queue']}/namespaces/minicpmv-finetune/localqueues/minicpmv-finetune",
            404,
            "queue of train",
            "failed",
            "components/kueue",
        ),
        (
            f"/apis/{GROUPS['runtime']}/namespaces/minicpmv-finetune/trainingruntimes/minicpmv-finetune",
            404,
            "training runtime minicpmv-finetune",
            "failed",
            "apply it, see k8s/README.md",
        ),
        (SPACE, {"metadata": {"labels": {}}}, "namespace", "failed", "is no Kubeflow Profile's"),
        (SPACE, 404, "namespace", "failed", "create a Kubeflow Profile minicpmv-finetune"),
        (SPACE, 403, "namespace", "skipped", "no permission"),
        (f"{SPACE}/configmaps/kfp-launcher", 404, "launcher", "failed", "Secret mlpipeline-minio-artifact: not found"),
        (CONTROLLER, 403, "retries", "skipped", "no permission"),
        (CONTROLLER, {"data": {}}, "retries", "ok", "may also repeat a step that failed"),
        ("/version", 403, "MLflow", "failed", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        ("/version", 500, "MLflow", "unreachable", "500"),
    ],
)
def test_a_missing_requirement_is_reported_with_a_remedy(
    path: str,
    answer: Any,
    name: str,
    state: str,
    message: str,
    production: Callable[..., Path],
    kubeflow: FakeKubeflow,
    command: Command,
) -> None:
    kubeflow.kubernetes[path] = answer
    found = _states(command, "--profile", production())
    assert found[name][0] == state
    assert message in found[name][1]
    code = command("preflight", "--profile", production()).code
    assert code == {"failed": 2, "unreachable": 75, "skipped": 0, "ok": 0}[state]


def test_a_server_with_one_user_creates_runs_in_its_own_namespace(
    production: Callable[..., Path], kubeflow: FakeKubeflow, command: Command
) -> None:
    kubeflow.tokens.clear()
    state, message = _states(command, "--profile", production())["namespace"]
    assert (state, "runs are created in kubeflow, its own namespace, and not in minicpmv-finetune" in message) == (
        "failed",
        True,
    )
    kubeflow.kubernetes["/api/v1/namespaces/kubeflow/services/ml-pipeline"] = {"metadata": {"name": "ml-pipeline"}}
    assert _states(command, "--profile", production(namespace="kubeflow"))["namespace"][0] == "ok"


def test_an_unknown_version_is_explained(
    production: Callable[..., Path], kubeflow: FakeKubeflow, command: Command
) -> None:
    kubeflow.answer_next(r"healthz", *['{"multi_user": true, "tag_name": "unknown"}'] * 2)
    assert "built without a version" in _states(command, "--profile", production())["Kubeflow Pipelines"][1]


def test_an_old_server_is_refused(production: Callable[..., Path], kubeflow: FakeKubeflow, command: Command) -> None:
    old = '{"multi_user": false, "tag_name": "2.4.0"}'
    kubeflow.answer_next(r"healthz", old, old)
    state, message = _states(command, "--profile", production())["Kubeflow Pipelines"]
    assert state == "failed"
    assert "2.17 or newer" in message


def test_unreachable_servers_are_temporary_faults(
    production: Callable[..., Path], command: Command, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, unreachable)
    found = _states(command, "--profile", production())
    assert {found[name][0] for name in ("Kubeflow Pipelines", "object storage", "MLflow")} == {"unreachable"}


@pytest.mark.parametrize("is_reachable", [True, False])
def test_addresses_are_printed_without_their_password(
    production: Callable[..., Path],
    kubeflow: FakeKubeflow,
    command: Command,
    unreachable: str,
    monkeypatch: pytest.MonkeyPatch,
    is_reachable: bool,
) -> None:
    address = kubeflow.url if is_reachable else unreachable
    for name in ("KF_PIPELINES_ENDPOINT", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, address.replace("//", "//user:hidden@"))
    printed = command("preflight", "--profile", production())
    assert "hidden" not in printed.out + printed.err
    lines = [line for line in printed.out.splitlines() if "Kubeflow Pipelines:" in line or "MLflow:" in line]
    assert len(lines) == 2
    assert all(address in line and line.startswith("ok") == is_reachable for line in lines), lines
    if is_reachable:
        printed = command("submit", *INPUTS)
        assert f"{address}/#/runs/" in printed.out
        assert "hidden" not in printed.out + printed.err


def test_a_tracking_address_that_is_not_a_server_is_printed_without_its_password(
    production: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:hidden@database/mlflow")
    state, detail = _states(command, "--profile", production())["MLflow"]
    assert state == "skipped"
    assert "postgresql://database/mlflow" in detail


def test_storage_that_denies_access_is_reported(
    production: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    assert _states(command, "--profile", production())["object storage"][0] == "failed"


def test_without_access_to_kubernetes_everything_else_is_checked(
    production: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    found = _states(command, "--profile", production())
    assert found["Kubernetes"][0] == "skipped"
    assert found["Kubeflow Pipelines"][0] == "ok"


@pytest.mark.parametrize(("size", "message"), [(None, "64 MB"), ("200Gi", "leaves nothing")])
def test_shared_memory_is_checked(
    size: str | None, message: str, production: Callable[..., Path], command: Command
) -> None:
    steps = yaml.safe_load((ROOT / "k8s" / "profiles" / "prod.yaml").read_text())["steps"]
    steps["evaluate"]["shared_memory"] = size
    state, detail = _states(command, "--profile", production(steps=steps))["shared memory of evaluate"]
    assert state == "failed"
    assert message in detail


def test_missing_data_and_a_missing_model_are_reported(
    production: Callable[..., Path], command: Command, s3_uri: str
) -> None:
    words = ("--profile", production(), "--data", f"{s3_uri}/no.json", "--base-model", f"{s3_uri}/model")
    found = _states(command, *words)
    assert found["data"][0] == "failed"
    assert found["base model"][0] == "failed"
    mounted = _states(command, "--profile", production(), "--base-model", "/models/MiniCPM-V-4.6")
    assert mounted["base model"][0] == "skipped"
    local = _states(command, "--profile", production(), "--base-model", "./MiniCPM-V-4.6")
    assert local["base model"][0] == "failed"
    assert "is a path on this machine" in local["base model"][1]


def test_a_container_image_is_checked_from_inside(command: Command) -> None:
    found = _states(command, "--image")
    assert {"import torch", "import kfp.dsl", "compiler", "user"} <= set(found)
    assert found["import pyarrow"][0] == "ok"
    assert found["user"][0] == ("failed" if os.getuid() == 0 else "ok")


def test_the_store_is_tried_with_the_keys_of_the_run_alone(
    production: Callable[..., Path], kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    keys = {name: base64.b64encode(os.environ[name].encode()).decode() for name in names}
    kubeflow.kubernetes[f"{SPACE}/secrets/minicpmv-s3"] = {"data": keys}
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of this machine's keys")
    state, message = _states(command, "--profile", production())["object storage"]
    assert (state, message.endswith("with the keys of Secret minicpmv-s3")) == ("ok", True), message
    assert "AWS_SESSION_TOKEN" not in os.environ


def test_without_a_profile_a_stock_installation_is_checked(
    command: Command, kubeflow: FakeKubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINICPMV_FINETUNE_PROFILE")
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    done = command("preflight")
    assert "No profile is named, so kubeflow is used" in done.err
    assert "skipped MLflow: the profile names none" in done.out


@pytest.mark.parametrize(
    ("change", "names", "state", "message"),
    [
        ({}, None, "skipped", "no registry, so your nodes must have them already; else `make images push REGISTRY=…`"),
        (
            {},
            ["docker.io/library/python:3"],
            "failed",
            "name that registry by --registry or MINICPMV_FINETUNE_REGISTRY",
        ),
        (
            {},
            [f"localhost/minicpmv-finetune/{name}:{VERSION}" for name in ("data", "trainer")],
            "ok",
            "nodes have them",
        ),
        (
            {"images": {"data": "r.example/data:1"}},
            ["r.example/data:1"],
            "failed",
            f"trainer:{VERSION} names no registry",
        ),
        ({"images": {"data": "r.example/data:1", "trainer": "r.example/trainer:1"}}, None, "ok", "r.example/trainer:1"),
    ],
)
def test_images_without_a_registry_must_be_on_the_nodes(
    change: dict[str, Any],
    names: list[str] | None,
    state: str,
    message: str,
    kubernetes_server: FakeKubernetes,
    profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MINICPMV_FINETUNE_REGISTRY", raising=False)
    if names is not None:
        nodes = [{"metadata": {"name": "node"}, "status": {"images": [{"names": names, "sizeBytes": 1}]}}]
        kubernetes_server.objects["/api/v1/nodes"] = {"items": nodes}
    found = run_check("container images", check_images, load_profile(profile(**change)))
    assert found.state == state
    assert message in found.detail


def test_mlflow_is_asked_with_the_credentials_of_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("USERNAME", "somebody"), ("PASSWORD", "hidden")):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    basic = base64.b64encode(b"somebody:hidden").decode()
    assert _request("http://mlflow:5000/version").get_header("Authorization") == f"Basic {basic}"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    assert _request("http://mlflow:5000/version").get_header("Authorization") == "Bearer token"
