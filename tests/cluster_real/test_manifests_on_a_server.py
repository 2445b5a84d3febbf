"""The manifests through a real `kube-apiserver`: needs KUBECONFIG alone, with the right to create namespaces.

Everything is a dry run of the server, in a namespace of its own that enforces Pod Security `restricted` and is deleted
afterwards. Custom resources whose definitions the cluster lacks are named as skipped.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_real.conftest import RealCluster

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted(path.parent.relative_to(ROOT / "k8s").as_posix() for path in (ROOT / "k8s").glob("overlays/*/*.yaml"))
FOLDERS = [*dict.fromkeys(name for name in OVERLAYS if name.count("/") == 1), "jobs/fetch-base-model"]
Manifest = dict[str, Any]


def kubectl(*words: str, content: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([KUBECTL, *words], input=content, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def restricted() -> Iterator[str]:
    """A namespace for dry runs, which enforces Pod Security `restricted`."""
    name = f"acceptance-{uuid.uuid4().hex[:6]}"
    if kubectl("create", "namespace", name).returncode:
        pytest.skip("the kubeconfig's user may not create namespaces")
    label = kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    assert label.returncode == 0, label.stderr
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def served() -> set[str]:
    """The kinds that the server knows."""
    listed = kubectl("api-resources", "--no-headers", "-o", "wide")
    assert listed.returncode == 0, listed.stderr
    return {word for line in listed.stdout.splitlines() for word in line.split() if word[:1].isupper()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_server_accepts_every_object(folder: str, restricted: str, served: set[str], tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (copy / "components" / "secrets" / "s3.env").write_text("AWS_ACCESS_KEY_ID=key\nAWS_SECRET_ACCESS_KEY=secret\n")
    rendered = kubectl("kustomize", str(copy / folder))
    assert rendered.returncode == 0, rendered.stderr
    items = [item for item in yaml.safe_load_all(rendered.stdout) if item["kind"] != "Namespace"]
    known = [item for item in items if item["kind"] in served]
    pods = [_pod(pod, restricted) for item in known for pod in _pod_specs(item)]
    _accepts([*(_moved(item, restricted) for item in known), *pods])
    if skipped := {item["kind"] for item in items} - served:
        print(f"{folder}: the cluster has no definition of {', '.join(sorted(skipped))}")


def test_pod_security_admits_every_pod_of_a_run(restricted: str, request: pytest.FixtureRequest) -> None:
    if not os.environ.get("KF_PIPELINES_ENDPOINT"):
        pytest.skip("needs a real Kubeflow Pipelines: KF_PIPELINES_ENDPOINT not set")
    cluster: RealCluster = request.getfixturevalue("cluster")
    run = request.getfixturevalue("trained")
    pods = json.loads(cluster.kubectl("get", "pods", "-l", f"pipeline/runid={run}", "-o", "json"))["items"]
    assert len(pods) > 5
    _accepts([_pod(pod["spec"], restricted) for pod in pods])


def _accepts(items: list[Manifest]) -> None:
    command = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    done = kubectl(*command, content=yaml.safe_dump_all(items))
    assert done.returncode == 0, done.stderr
    assert "violate PodSecurity" not in done.stderr, done.stderr


def _moved(item: Manifest, namespace: str) -> Manifest:
    moved: Manifest = {**item, "metadata": {**item["metadata"], "namespace": namespace}}
    if item["kind"] == "RoleBinding":
        moved["subjects"] = [{**one, "namespace": one.get("namespace", namespace)} for one in item["subjects"]]
    return moved


def _pod(spec: Manifest, namespace: str) -> Manifest:
    """A pod with this specification, without what only the cluster that runs it knows."""
    left_out = ("nodeName", "serviceAccount", "serviceAccountName", "priority", "hostNetwork")
    kept = {name: value for name, value in spec.items() if name not in left_out}
    metadata = {"name": f"pod-{uuid.uuid4().hex[:6]}", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"restartPolicy": "Never", **kept}}


def _pod_specs(item: Manifest) -> list[Manifest]:
    """The pods that an object would make."""
    spec = item.get("spec", {})
    if item["kind"] in {"Deployment", "StatefulSet", "Job"}:
        pod = spec["template"]["spec"]
        # The controller adds the volumes of a StatefulSet's claims.
        claimed = [
            {"name": name, "persistentVolumeClaim": {"claimName": name}}
            for name in (claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", []))
        ]
        return [pod | {"restartPolicy": "Never", "volumes": [*pod.get("volumes", []), *claimed]}]
    if item["kind"] == "TrainingRuntime":
        jobs = spec["template"]["spec"]["replicatedJobs"]
        return [job["template"]["spec"]["template"]["spec"] for job in jobs]
    return []
