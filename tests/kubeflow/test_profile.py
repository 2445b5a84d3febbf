"""The compiled pipelines meet every requirement of a platform team, and the committed files are up to date."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.kubeflow.compiling import content_digest, write_objects, write_pipeline
from minicpmv_finetune.kubeflow.profile import load_profile, with_profile
from minicpmv_finetune.pipelines import finetune
from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.retraining import RETRAIN

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "k8s" / "profiles").glob("*.yaml"))
COMPILED = ROOT / "pipelines" / "compiled"
BY_NAME = pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)

Document = tuple[dict[str, Any], dict[str, Any]]


def _read(name: str) -> Document:
    pipeline, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def _tasks(pipeline: dict[str, Any], dag: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task that runs a container, also those inside a condition, a loop or an exit handler."""
    for name, task in dag["tasks"].items():
        component = pipeline["components"][task["componentRef"]["name"]]
        if "dag" in component:
            yield from _tasks(pipeline, component["dag"])
        else:
            yield name, task


def _seconds(retry: dict[str, Any], field: str) -> int:
    return int(retry.get(field, "0s").removesuffix("s"))


def _longest_duration(retry: dict[str, Any], pod: dict[str, Any]) -> float:
    """Seconds that a step may take whose every attempt uses its whole time, with Argo's waits between them."""
    attempts, first = retry.get("maxRetryCount", 0), _seconds(retry, "backoffDuration")
    waits = sum(first * retry.get("backoffFactor", 2) ** number for number in range(attempts))
    return (attempts + 1) * int(pod.get("activeDeadlineSeconds", 0)) + waits


def violations(document: Document) -> Iterator[str]:
    """Yield the requirements that a compiled pipeline does not meet."""
    pipeline, platform = document
    executors = pipeline["deploymentSpec"]["executors"]
    for name, task in _tasks(pipeline, pipeline["root"]["dag"]):
        label = pipeline["components"][task["componentRef"]["name"]]["executorLabel"]
        container, pod = executors[label]["container"], platform.get(label, {})
        resources, retry = container.get("resources", {}), task.get("retryPolicy", {})
        labels = pod.get("podMetadata", {}).get("labels", {})
        requirements = {
            "image": re.search(r"(@sha256:[0-9a-f]{64}|:(?!latest)[\w.-]+)$", container["image"]),
            "non-root": pod.get("securityContext", {}).get("runAsNonRoot") is True,
            "user": int(pod.get("securityContext", {}).get("runAsUser", 0)) > 0,
            "cpu": {"resourceCpuRequest", "resourceCpuLimit"} <= set(resources),
            "memory": {"resourceMemoryRequest", "resourceMemoryLimit"} <= set(resources),
            "timeout": int(pod.get("activeDeadlineSeconds", 0)) > 0,
            "retry": retry.get("maxRetryCount", 0) > 0 and retry.get("backoffFactor", 0) > 1,
            "backoff": _seconds(retry, "backoffDuration") in range(1, 11),  # a mistake ends after it
            "duration": _seconds(retry, "backoffMaxDuration") >= _longest_duration(retry, pod),
            "labels": {"app.kubernetes.io/name", "app.kubernetes.io/component", "environment"} <= set(labels),
            "scratch": any(mount["mountPath"] == "/scratch" for mount in pod.get("emptyDirMounts", [])),
            "pull policy": pod.get("imagePullPolicy") == "IfNotPresent",
            "credentials": {
                key["envVar"] for secret in pod.get("secretAsEnv", []) for key in secret["keyToEnv"]
            }.issuperset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}),
            "no visible secret": not re.search(
                r"(?i)secret|password|token", " ".join(item["name"] for item in container.get("env", []))
            ),
        }
        follows_nodes = {"name": environment.TRAIN_ON_NODES.name, "value": "true"} in container.get("env", [])
        if name == "train" and not follows_nodes:
            requirements |= {
                "accelerator": int(resources.get("accelerator", {}).get("resourceCount", 0)) > 0,
                "shared memory": any(
                    mount["mountPath"] == "/dev/shm" and mount.get("medium") == "Memory" and mount.get("sizeLimit")
                    for mount in pod.get("emptyDirMounts", [])
                ),
                "tolerations": pod.get("tolerations"),
                "node selector": pod.get("nodeSelector", {}).get("labels"),
            }
        yield from (f"{name}: {requirement}" for requirement, is_met in requirements.items() if not is_met)


@BY_NAME
def test_committed_pipelines_meet_every_requirement(profile: Path) -> None:
    for name, pipeline in ((profile.stem, FINETUNE), (f"{profile.stem}.retrain", RETRAIN)):
        document = _read(name)
        assert {name for name, _ in _tasks(document[0], document[0]["root"]["dag"])} == set(pipeline.steps)
        assert list(violations(document)) == []


_REMOVALS: dict[str, Callable[[Any, Any, Any], object]] = {
    "image": lambda container, pod, task: container.update(image="minicpmv-finetune/trainer:latest"),
    "non-root": lambda container, pod, task: pod["securityContext"].pop("runAsNonRoot"),
    "user": lambda container, pod, task: pod["securityContext"].update(runAsUser="0"),
    "cpu": lambda container, pod, task: container["resources"].pop("resourceCpuLimit"),
    "memory": lambda container, pod, task: container["resources"].pop("resourceMemoryRequest"),
    "timeout": lambda container, pod, task: pod.pop("activeDeadlineSeconds"),
    "retry": lambda container, pod, task: task["retryPolicy"].pop("backoffFactor"),
    "backoff": lambda container, pod, task: task["retryPolicy"].pop("backoffDuration"),
    "duration": lambda container, pod, task: task["retryPolicy"].update(backoffMaxDuration="3600s"),
    "labels": lambda container, pod, task: pod["podMetadata"]["labels"].pop("environment"),
    "scratch": lambda container, pod, task: pod["emptyDirMounts"].pop(0),
    "pull policy": lambda container, pod, task: pod.pop("imagePullPolicy"),
    "credentials": lambda container, pod, task: pod["secretAsEnv"].pop(0),
    "no visible secret": lambda container, pod, task: container["env"].append({"name": "AWS_SECRET_ACCESS_KEY"}),
    "accelerator": lambda container, pod, task: container["resources"].pop("accelerator"),
    "shared memory": lambda container, pod, task: pod["emptyDirMounts"].pop(1),
    "tolerations": lambda container, pod, task: pod.pop("tolerations"),
    "node selector": lambda container, pod, task: pod.pop("nodeSelector"),
}


@pytest.mark.parametrize("requirement", _REMOVALS)
def test_a_requirement_that_is_not_met_is_found(requirement: str) -> None:
    pipeline, platform = copy.deepcopy(_read("dev"))
    container = pipeline["deploymentSpec"]["executors"]["exec-train"]["container"]
    _REMOVALS[requirement](container, platform["exec-train"], _task_of(pipeline, "train"))
    assert list(violations((pipeline, platform))) == [f"train: {requirement}"]


def _task_of(pipeline: dict[str, Any], step: str) -> Any:
    return dict(_tasks(pipeline, pipeline["root"]["dag"]))[step]


@pytest.mark.parametrize("field", ["longest_wait", "longest_backoff"])  # the second is its name in 0.1.0
def test_a_step_waits_after_faults_as_the_profile_says(field: str, tmp_path: Path) -> None:
    retry = {"attempts": 4, "backoff": "60s", "factor": 3, field: "600s"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(PROFILES[0].read_text()) | {"retry": retry}))
    pipeline = yaml.safe_load_all(write_pipeline(FINETUNE, load_profile(path), tmp_path / "p.yaml").read_text())
    executors = next(pipeline)["deploymentSpec"]["executors"]
    for executor in executors.values():
        variables = {variable["name"]: variable["value"] for variable in executor["container"]["env"]}
        assert variables[environment.RETRY_WAITS.name] == "60 180 540 600"


def test_in_production_steps_with_gpus_have_a_queue() -> None:
    _, platform = _read("prod")
    queued = {label for label, pod in platform.items() if "kueue.x-k8s.io/queue-name" in pod["podMetadata"]["labels"]}
    assert queued == {"exec-train", "exec-evaluate"}


def test_the_train_step_gets_the_clusters_training_runtime() -> None:
    executors = _read("prod")[0]["deploymentSpec"]["executors"]
    named = {
        label: variable["value"]
        for label, executor in executors.items()
        for variable in executor["container"].get("env", [])
        if variable["name"] == environment.TRAINING_RUNTIME.name
    }
    assert named == {"exec-train": "minicpmv-finetune"}


def test_in_production_the_pod_that_follows_the_nodes_has_no_gpu() -> None:
    pipeline, _ = _read("prod")
    executors = pipeline["deploymentSpec"]["executors"]
    with_gpus = {
        label for label, executor in executors.items() if "accelerator" in executor["container"].get("resources", {})
    }
    assert with_gpus == {"exec-evaluate"}


@pytest.mark.parametrize(("name", "account"), [("kubeflow", "pipeline-runner"), ("kubeflow-profile", "default-editor")])
def test_a_profile_of_the_package_fits_a_stock_installation(name: str, account: str, tmp_path: Path) -> None:
    settings = load_profile(name, "" if name == "kubeflow" else "team-a")
    assert (settings.namespace, settings.service_account) == ("kubeflow" if name == "kubeflow" else "team-a", account)
    assert settings.secrets() == {"mlpipeline-minio-artifact": {"accesskey", "secretkey"}}
    assert (settings.pipeline_root, settings.claims(), settings.mlflow) == ("", [], None)
    pipeline, platform = yaml.safe_load_all(write_pipeline(FINETUNE, settings, tmp_path / "p.yaml").read_text())
    document = pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    # Labels of its nodes and of its environments are a cluster's own.
    found = {place for place in violations(document) if not place.endswith(": labels")}
    assert found == {"train: node selector"}
    executors = pipeline["deploymentSpec"]["executors"]
    gpus = {
        label: executor["container"]["resources"]["accelerator"]
        for label, executor in executors.items()
        if "accelerator" in executor["container"]["resources"]
    }
    assert set(gpus) == {"exec-train", "exec-evaluate"}
    assert {(gpu["type"], gpu["count"]) for gpu in gpus.values()} == {("nvidia.com/gpu", "1")}


def test_without_gpus_no_step_asks_for_one_though_all_did(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "k8s/profiles/dev.yaml").read_text())
    content |= {"default": content["steps"]["train"], "steps": {}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    settings = load_profile(tmp_path / "mine.yaml").with_gpus(0)
    for step in ("train", "merge"):
        found = settings.step_settings(step)
        assert (found.accelerator, found.tolerations, found.node_selector) == (None, (), {})


def test_hub_proxy_certificates_and_volumes_reach_every_pod(tmp_path: Path) -> None:
    content = yaml.safe_load(PROFILES[0].read_text()) | {
        "hub": {"secret": "hub", "endpoint": "https://hub.example.com"},
        "proxy": {"https": "http://proxy.example.com:3128", "bypass": ["store.example.com"]},
        "ca_bundle": {"config_map": "minicpmv-ca-bundle"},
        "volumes": [{"claim": "datasets", "mount": "/data"}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    settings = load_profile(tmp_path / "mine.yaml")
    assert settings.claims() == ["base-models", "datasets"]
    assert (settings.claim_of("/data/receipts/train.json"), settings.claim_of("/database")) == ("datasets", "")
    assert settings.secrets()["hub"] == {"HF_TOKEN"}
    pipeline, platform = yaml.safe_load_all(write_pipeline(RETRAIN, settings, tmp_path / "p.yaml").read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for label, executor in pipeline["deploymentSpec"]["executors"].items():
        pod = pods[label]
        env = {item["name"]: item["value"] for item in executor["container"]["env"]}
        assert env["HF_ENDPOINT"] == "https://hub.example.com"
        assert env["HTTPS_PROXY"] == env["https_proxy"] == "http://proxy.example.com:3128"
        assert {"$(KUBERNETES_SERVICE_HOST)", ".kubeflow", "store.example.com"} <= set(env["NO_PROXY"].split(","))
        assert env["SSL_CERT_FILE"] == env["AWS_CA_BUNDLE"] == "/etc/minicpmv-ca/ca.crt"
        assert {"datasets", "base-models"} <= {mount["constant"] for mount in pod["pvcMount"]}
        assert [mount["mountPath"] for mount in pod["configMapAsVolume"]] == ["/etc/minicpmv-ca"]
        assert "HF_TOKEN" in {key["envVar"] for secret in pod["secretAsEnv"] for key in secret["keyToEnv"]}


@BY_NAME
def test_committed_files_equal_newly_compiled_ones(profile: Path, tmp_path: Path) -> None:
    settings = load_profile(profile)
    for pipeline, name in ((FINETUNE, profile.stem), (RETRAIN, f"{profile.stem}.retrain")):
        write_pipeline(pipeline, settings, tmp_path / f"{name}.yaml")
        write_objects(pipeline, settings, tmp_path / f"{name}.objects.yaml")
    for path in tmp_path.iterdir():
        assert path.read_text() == (COMPILED / path.name).read_text(), "run make compiled"


def test_every_pod_of_a_shared_preprocess_has_the_settings(tmp_path: Path) -> None:
    settings = load_profile(PROFILES[0]).model_copy(update={"preprocess_partitions": 3})
    pipeline, platform = yaml.safe_load_all(write_pipeline(FINETUNE, settings, tmp_path / "p.yaml").read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(pods) == set(pipeline["deploymentSpec"]["executors"]) > {"exec-preprocess-part"}
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods.values())


@BY_NAME
def test_objects_contain_the_same_pipeline(profile: Path) -> None:
    pipeline, version = yaml.safe_load_all((COMPILED / f"{profile.stem}.objects.yaml").read_text())
    plain, platform = yaml.safe_load_all((COMPILED / f"{profile.stem}.yaml").read_text())
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    assert version["spec"]["pipelineSpec"] == plain
    assert version["spec"]["platformSpec"] == platform
    assert version["metadata"]["name"].endswith(content_digest(with_profile(finetune, load_profile(profile))))


def test_the_run_form_has_a_title_and_a_sentence_for_every_input() -> None:
    pipeline, _ = _read("dev")
    info = pipeline["pipelineInfo"]
    assert info["displayName"]
    assert info["description"]
    offered = pipeline["root"]["inputDefinitions"]["parameters"]
    assert set(offered) == set(inspect.signature(finetune.pipeline_func).parameters)
    assert all(item["description"].endswith(".") for item in offered.values())


def test_kubeflow_does_not_cache_the_validation() -> None:
    pipeline, _ = _read("dev")
    assert "enableCache" not in _task_of(pipeline, "validate-data")["cachingOptions"]


def test_the_pipeline_itself_is_not_changed() -> None:
    before = content_digest(finetune)
    with_profile(finetune, load_profile(PROFILES[0]))
    assert content_digest(finetune) == before


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"images": {"data": "x/data:latest", "trainer": "x/trainer:1"}}, "images.data"),
        ({"images": {"data": "x/data", "trainer": "x/trainer:1"}}, "images.data"),
        ({"identity": {"user": 0}}, "identity.user"),
        ({"steps": {"train": {"cpu": ["4", "8"]}}}, "steps.train.memory"),
        ({"steps": {"trian": {}}}, "steps.trian"),
        ({"labels": {"team": "x" * 64}}, "labels.team"),
        ({"s3": {"secret": "s3", "password": "hunter2"}}, "s3.password"),
        ({"volumes": [{"claim": "a", "mount": "/scratch/a"}]}, "/scratch/a belongs to the container"),
        ({"volumes": [{"claim": "a", "mount": "/./"}]}, "/./ belongs to the container"),
        ({"volumes": [{"claim": "a", "mount": "/data/../etc"}]}, "/data/../etc belongs to the container"),
        ({"volumes": [{"claim": "a", "mount": "/minio"}]}, "/minio belongs to the container or to Kubeflow"),
        ({"volumes": [{"claim": "base-models", "mount": "/data"}]}, "the claim base-models is named twice"),
        ({"volumes": [{"claim": "a", "mount": "/models"}]}, "/models is mounted twice"),
        ({"proxy": {"https": "proxy:3128"}}, "proxy.https"),
        ({"train_on_nodes": True}, "train_on_nodes: there is no runtime"),
    ],
)
def test_the_message_about_a_wrong_profile_names_the_place(change: dict[str, Any], place: str, tmp_path: Path) -> None:
    content = yaml.safe_load(PROFILES[0].read_text()) | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=re.escape(place)) as caught:
        load_profile(path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "a: [", "- 1"])
def test_a_file_without_a_profile_is_refused_in_one_sentence(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.yaml: .*;"):
        load_profile(path)
