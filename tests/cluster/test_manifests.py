"""The rendered manifests: they are valid for the API server, and meet every rule of a platform team."""

import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

from minicpmv_finetune import storage
from minicpmv_finetune.errors import USER_ERROR_EXIT, UserError
from minicpmv_finetune.kubeflow.profile import QUEUE_LABEL, load_profile

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = ["overlays/dev", "overlays/prod", "jobs/fetch-base-model"]

Manifest = dict[str, Any]

# Fields of custom resources that the project's objects may have: required ones (True) and used optional ones (False).
_CUSTOM_RESOURCES = {
    # kueue.x-k8s.io/v1beta1, config/components/crd/bases/kueue.x-k8s.io_localqueues.yaml
    "LocalQueue": {"clusterQueue": True, "stopPolicy": False},
    # external-secrets.io/v1, config/crds/bases/external-secrets.io_externalsecrets.yaml
    "ExternalSecret": {"secretStoreRef": True, "target": True, "data": True, "refreshInterval": False},
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """Every kustomization, as `kubectl apply -k` sends it."""
    folder = shutil.copytree(ROOT / "k8s", tmp_path_factory.mktemp("manifests") / "k8s")
    (folder / "components" / "secrets" / "s3.env").write_text("AWS_ACCESS_KEY_ID=key\nAWS_SECRET_ACCESS_KEY=secret\n")
    return {name: list(yaml.safe_load_all(_render(folder / name))) for name in OVERLAYS}


def _render(folder: Path) -> str:
    return subprocess.run([KUBECTL, "kustomize", folder], check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered[request.param]


@pytest.fixture(params=["overlays/dev", "overlays/prod"])
def overlay(request: pytest.FixtureRequest, rendered: dict[str, list[Manifest]]) -> list[Manifest]:
    return rendered[request.param]


def _named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [item for item in manifests if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def _pods(manifests: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Every pod template, with the name of the object that creates its pods."""
    found = []
    for item in manifests:
        spec = item.get("spec", {})
        if item["kind"] in {"Deployment", "StatefulSet", "Job"}:
            found.append((item["metadata"]["name"], spec["template"]["spec"]))
        if item["kind"] == "TrainingRuntime":
            found += [
                (job["name"], job["template"]["spec"]["template"]["spec"])
                for job in spec["template"]["spec"]["replicatedJobs"]
            ]
    return found


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_every_object_is_valid(manifests: list[Manifest]) -> None:
    for item in manifests:
        if item["kind"] in _CUSTOM_RESOURCES:
            fields = _CUSTOM_RESOURCES[item["kind"]]
            assert set(item["spec"]) <= set(fields)
            assert {name for name, required in fields.items() if required} <= set(item["spec"])
        elif item["kind"] == "TrainingRuntime":
            _check_trainer_object(TrainerV1alpha1TrainingRuntime, item)
        else:
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_the_example_trainjob_is_valid(rendered: dict[str, list[Manifest]]) -> None:
    job = yaml.safe_load((ROOT / "k8s" / "examples" / "trainjob.yaml").read_text())
    _check_trainer_object(TrainerV1alpha1TrainJob, job)
    reference = job["spec"]["runtimeRef"]
    assert _named(rendered["overlays/prod"], reference["kind"], reference["name"])


def _check_trainer_object(model: Any, item: Manifest) -> None:
    """Check that Kubeflow's own model has all fields; it drops unknown ones, so they are missing afterwards."""
    known = model.from_dict(item).to_dict()
    assert _without_empty(known) == _without_empty(item)


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item not in (None, {}, [])}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def test_every_object_is_in_the_namespace(manifests: list[Manifest]) -> None:
    for item in manifests:
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "minicpmv-finetune", item["metadata"]


def test_no_object_is_cluster_wide(manifests: list[Manifest]) -> None:
    assert not {item["kind"] for item in manifests} & {"ClusterRole", "ClusterRoleBinding"}


def test_the_namespace_has_pod_security_restricted(overlay: list[Manifest]) -> None:
    labels = _named(overlay, "Namespace", "minicpmv-finetune")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}


def test_pods_meet_pod_security_restricted(manifests: list[Manifest]) -> None:
    for name, pod in _pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in _containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, container["name"]


def test_services_cannot_write_to_their_root_filesystem(manifests: list[Manifest]) -> None:
    for name, pod in _pods(manifests):
        for container in _containers(pod):
            # Training compiles kernels at run time and stores them beside the libraries.
            assert name == "node" or container["securityContext"]["readOnlyRootFilesystem"] is True, container["name"]


def test_containers_have_requests_and_limits(manifests: list[Manifest]) -> None:
    for _, pod in _pods(manifests):
        for container in _containers(pod):
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][bound]), container["name"]


def test_container_images_are_pinned(manifests: list[Manifest]) -> None:
    for _, pod in _pods(manifests):
        for container in _containers(pod):
            assert re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest)[\w.-]+)$", container["image"]), container["image"]


def test_services_have_probes(overlay: list[Manifest]) -> None:
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "s3")):
        for item in overlay:
            if (item["kind"], item["metadata"]["name"]) == (kind, name):
                (container,) = item["spec"]["template"]["spec"]["containers"]
                assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_pods_get_no_service_account_token(manifests: list[Manifest]) -> None:
    for name, pod in _pods(manifests):
        assert pod["automountServiceAccountToken"] is False, name


def test_temporary_volumes_have_a_size_limit(manifests: list[Manifest]) -> None:
    for name, pod in _pods(manifests):
        for volume in pod.get("volumes", []):
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], name


def test_roles_have_least_privilege(overlay: list[Manifest]) -> None:
    for role in (item for item in overlay if item["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            if {"secrets", "configmaps"} & set(rule["resources"]):
                assert rule["resourceNames"]
                assert rule["verbs"] == ["get"]
            if "pods" in rule["resources"]:
                assert set(rule["verbs"]) <= {"get", "list", "watch"}


def test_runs_have_their_own_role(overlay: list[Manifest]) -> None:
    binding = _named(overlay, "RoleBinding", "minicpmv-finetune-run")
    assert [subject["name"] for subject in binding["subjects"]] == ["minicpmv-finetune"]


def test_the_train_step_may_manage_trainjobs(rendered: dict[str, list[Manifest]]) -> None:
    rules = _named(rendered["overlays/prod"], "Role", "minicpmv-finetune-nodes")["rules"]
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed == {("trainjobs", "get"), ("trainjobs", "create"), ("trainjobs", "delete"), ("pods/log", "get")}


def test_a_users_mistake_ends_a_trainjob_and_a_lost_node_does_not(rendered: dict[str, list[Manifest]]) -> None:
    (runtime,) = [item for item in rendered["overlays/prod"] if item["kind"] == "TrainingRuntime"]
    jobset = runtime["spec"]["template"]["spec"]
    (job,) = jobset["replicatedJobs"]
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [USER_ERROR_EXIT]
    assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"] == job["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert jobset["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0


def test_traffic_is_denied_unless_a_policy_allows_it(overlay: list[Manifest]) -> None:
    deny = _named(overlay, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in (item for item in overlay if item["kind"] == "NetworkPolicy"):
        for direction in ("ingress", "egress"):
            for rule in policy["spec"].get(direction, []):
                assert rule.get("from") or rule.get("to"), policy["metadata"]["name"]
                for peer in rule.get("to", []):
                    if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                        assert rule["ports"], policy["metadata"]["name"]
                        assert "169.254.0.0/16" in peer["ipBlock"]["except"]  # the cloud's metadata server


@pytest.mark.parametrize(
    ("policy", "port"),
    [("dns", 53), ("run-to-kubeflow", 8887), ("run-to-mlflow", 5000), ("to-s3", None), ("notify-to-webhook", 443)],
)
def test_policies_allow_the_traffic_that_a_run_needs(policy: str, port: int | None, overlay: list[Manifest]) -> None:
    rules = _named(overlay, "NetworkPolicy", policy)["spec"]["egress"]
    ports = {item["port"] for rule in rules for item in rule["ports"]}
    assert port in ports if port else ports


def test_development_storage_is_inside_the_namespace(rendered: dict[str, list[Manifest]]) -> None:
    (rule,) = _named(rendered["overlays/dev"], "NetworkPolicy", "to-s3")["spec"]["egress"]
    assert rule["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "s3"}}}]


def test_the_namespace_has_a_quota_and_default_limits(overlay: list[Manifest]) -> None:
    hard = _named(overlay, "ResourceQuota", "minicpmv-finetune")["spec"]["hard"]
    assert {"requests.cpu", "limits.memory", "requests.nvidia.com/gpu", "pods", "requests.storage"} <= set(hard)
    (limit,) = _named(overlay, "LimitRange", "minicpmv-finetune")["spec"]["limits"]
    assert {"cpu", "memory"} <= set(limit["default"])
    assert {"cpu", "memory"} <= set(limit["defaultRequest"])


def test_no_secret_is_in_the_repository() -> None:
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            assert item is None or item.get("kind") != "Secret", path
    for example in (ROOT / "k8s").rglob("*.env.example"):
        assert all(line.endswith("=") for line in example.read_text().split())
    ignored = subprocess.run(["git", "check-ignore", "k8s/components/secrets/s3.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


def test_mlflow_serves_its_artifacts(overlay: list[Manifest]) -> None:
    (container,) = _named(overlay, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert "--serve-artifacts" in container["command"]
    assert {"name": "MLFLOW_ARTIFACTS_DESTINATION", "value": "s3://minicpmv-finetune/mlflow"} in container["env"]


def test_mlflow_uses_a_file_in_development_and_a_database_in_production(rendered: dict[str, list[Manifest]]) -> None:
    development = _named(rendered["overlays/dev"], "Deployment", "mlflow")["spec"]
    assert (development["replicas"], development["strategy"]["type"]) == (1, "Recreate")
    production = _named(rendered["overlays/prod"], "Deployment", "mlflow")["spec"]
    assert (production["replicas"], production["strategy"]["type"]) == (2, "RollingUpdate")
    (container,) = production["template"]["spec"]["containers"]
    (store,) = [item for item in container["env"] if item["name"] == "MLFLOW_BACKEND_STORE_URI"]
    assert store == {
        "name": "MLFLOW_BACKEND_STORE_URI",
        "valueFrom": {"secretKeyRef": {"name": "mlflow-database", "key": "uri"}},
    }
    budget = _named(rendered["overlays/prod"], "PodDisruptionBudget", "mlflow")["spec"]
    assert budget["minAvailable"] < production["replicas"]


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_profiles_name_objects_of_the_overlay(name: str, rendered: dict[str, list[Manifest]]) -> None:
    profile, manifests = load_profile(ROOT / "k8s" / "profiles" / f"{name}.yaml"), rendered[f"overlays/{name}"]
    assert _named(manifests, "Namespace", profile.namespace)
    assert _named(manifests, "ServiceAccount", profile.service_account)
    assert profile.base_models
    claim = _named(manifests, "PersistentVolumeClaim", profile.base_models.claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for secret, keys in profile.secrets().items():
        made = [item for item in manifests if item["kind"] in {"Secret", "ExternalSecret"}]
        (found,) = [item for item in made if item["metadata"]["name"] == secret]
        offered = found["data"] if found["kind"] == "Secret" else {item["secretKey"] for item in found["spec"]["data"]}
        assert keys <= set(offered)
    for task in profile.steps.values():
        assert task.queue is None or _named(manifests, "LocalQueue", task.queue)
    if profile.runtime:
        runtime = _named(manifests, "TrainingRuntime", profile.runtime)
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == profile.images.trainer
    job = yaml.safe_load((ROOT / "k8s" / "examples" / "trainjob.yaml").read_text())
    assert set(job["metadata"]["labels"]) == {QUEUE_LABEL}


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_runs_may_read_the_pipeline_root(name: str, rendered: dict[str, list[Manifest]]) -> None:
    manifests = rendered[f"overlays/{name}"]
    providers = yaml.safe_load(_named(manifests, "ConfigMap", "kfp-launcher")["data"]["providers"])
    credentials = providers["s3"]["default"]["credentials"]["secretRef"]
    profile = load_profile(ROOT / "k8s" / "profiles" / f"{name}.yaml")
    assert credentials["secretName"] == profile.s3.secret
    assert {credentials["accessKeyKey"], credentials["secretKeyKey"]} == set(profile.s3.variables)
    (rule,) = [
        rule for rule in _named(manifests, "Role", "minicpmv-finetune-run")["rules"] if rule["resources"] == ["secrets"]
    ]
    assert rule["resourceNames"] == [profile.s3.secret]
    assert _named(manifests, "ConfigMap", "kfp-launcher")["data"]["defaultPipelineRoot"] == profile.pipeline_root
    endpoint = providers["s3"]["default"]["endpoint"]
    assert endpoint == profile.s3.endpoint.split("://")[1]


def _listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_development_storage_accepts_only_the_secrets_credentials(
    rendered: dict[str, list[Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the manifest's own command and environment, because rclone's syntax for lists is easily wrong."""
    (container,) = _named(rendered["overlays/dev"], "StatefulSet", "s3")["spec"]["template"]["spec"]["containers"]
    (keys,) = [item["value"] for item in container["env"] if item["name"] == "RCLONE_AUTH_KEY"]
    secret = {"AWS_ACCESS_KEY_ID": "some-key", "AWS_SECRET_ACCESS_KEY": "some-secret"}
    for name, value in secret.items():
        keys = keys.replace(f"$({name})", value)
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "minicpmv-finetune").mkdir()
    command = [str(tmp_path) if word == "/data" else word for word in container["command"]]
    command = [address if word == ":9000" else word for word in command]
    rclone = Path(sys.executable).with_name(command[0])
    monkeypatch.setenv("RCLONE_AUTH_KEY", keys)
    with subprocess.Popen([rclone, *command[1:]], stderr=subprocess.DEVNULL) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        while not _listens(address):
            with suppress(subprocess.TimeoutExpired):
                raise RuntimeError(f"rclone ended with exit code {server.wait(timeout=0.02)}")
        storage.write_bytes("s3://minicpmv-finetune/a", b"content")
        assert storage.read_bytes("s3://minicpmv-finetune/a") == b"content"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with pytest.raises(UserError):
            storage.read_bytes("s3://minicpmv-finetune/a")
        server.terminate()
