import base64
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from minicpmv_finetune.cli import main
from minicpmv_finetune.inputs import checks
from tests.cluster.commands import ROOT, Answer, Command
from tests.cluster.fake_kubeflow import FakeKubeflow, serving
from tests.cluster.fake_kubernetes import FakeKubernetes
from tests.cluster.fake_kubernetes import serving as serve_kubernetes

KEYS = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}


@pytest.fixture(autouse=True)
def no_look_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands do not look up data and base model, which do not exist; `tests/inputs/test_checks.py` does."""
    for name in ("_check_kind", "_read_data"):
        monkeypatch.setattr(checks, name, lambda *arguments: [])
    # A command sets these from its profile; they must not stay behind.
    store = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    for variable in (*store, "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        if variable not in os.environ:
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKubeflow]:
    """A new server, whose address is in the environment."""
    with serving(FakeKubeflow()) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        monkeypatch.delenv("KF_PIPELINES_TOKEN", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield fake


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs the command line in this process with the development profile."""
    monkeypatch.setenv("MINICPMV_FINETUNE_PROFILE", str(ROOT / "k8s" / "profiles" / "dev.yaml"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", *map(str, words)])
        code = 0
        try:
            main.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        output = capsys.readouterr()
        return Answer(code, output.out, output.err)

    return run


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the development profile with some fields changed."""

    def write(**change: Any) -> Path:
        content = yaml.safe_load((ROOT / "k8s" / "profiles" / "dev.yaml").read_text())
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({**content, **change}))
        return path

    return write


@pytest.fixture
def kubernetes_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """A Kubernetes API server, to which the environment's kubeconfig leads."""
    with serve_kubernetes(tmp_path) as (state, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield state


def make_namespace(state: FakeKubernetes, namespace: str, account: str, root: str, keys: dict[str, str]) -> None:
    """What a stock Kubeflow has in a namespace of runs, as recorded."""
    space = f"/api/v1/namespaces/{namespace}"
    labels = {"pipelines.kubeflow.org/enabled": "true", "app.kubernetes.io/part-of": "kubeflow-profile"}
    data = {key: base64.b64encode(keys[variable].encode()).decode() for key, variable in KEYS.items()}
    policy = "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}"
    state.objects.update(
        {
            space: {"metadata": {"name": namespace, "labels": labels if namespace != "kubeflow" else {}}},
            f"{space}/serviceaccounts/{account}": {"metadata": {"name": account}},
            f"{space}/secrets/mlpipeline-minio-artifact": {"data": data},
            f"{space}/configmaps/kfp-launcher": {"data": {"defaultPipelineRoot": root}},
            "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap": {
                "data": {"workflowDefaults": policy}
            },
        }
    )


@pytest.fixture
def stock(
    kubeflow: FakeKubeflow,
    kubernetes_server: FakeKubernetes,
    s3_server: dict[str, str],
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> FakeKubernetes:
    """A stock Kubeflow with one user, seen from outside with nothing but a kubeconfig."""
    make_namespace(kubernetes_server, "kubeflow", "pipeline-runner", "", s3_server)
    for service, port, url in (
        ("seaweedfs", 9000, s3_server["AWS_ENDPOINT_URL"]),
        ("ml-pipeline", 8888, kubeflow.url),
    ):
        server = urlsplit(url)
        kubernetes_server.add_service("kubeflow", service, port, (str(server.hostname), int(server.port or 0)))
    for name in ("AWS_ENDPOINT_URL", *KEYS.values(), "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MINICPMV_FINETUNE_REGISTRY", "MINICPMV_FINETUNE_NAMESPACE", "MINICPMV_FINETUNE_MLFLOW"):
        monkeypatch.delenv(name, raising=False)
    return kubernetes_server
