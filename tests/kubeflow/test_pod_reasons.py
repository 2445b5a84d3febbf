"""Why pods wait and die, from pods that a real Kubernetes had, and from sentences of Kubernetes and Argo."""

from typing import Any

import pytest

from minicpmv_finetune.kubeflow.pod_reasons import why_died, why_node_ended, why_waiting
from minicpmv_finetune.kubeflow.profile import Profile, load_profile
from tests.cluster.commands import ROOT
from tests.kubeflow.recorded import read_pods


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(ROOT / "k8s" / "profiles" / "prod.yaml")


def _pending(**status: Any) -> dict[str, Any]:
    return {"status": {"phase": "Pending", **status}}


def _unscheduled(message: str, reason: str = "Unschedulable") -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return _pending(conditions=[condition])


def _waits(reason: str, message: str = "") -> dict[str, Any]:
    return _pending(containerStatuses=[{"name": "main", "state": {"waiting": {"reason": reason, "message": message}}}])


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        ("gpu", ("no node has enough nvidia.com/gpu (", "steps.train.accelerator", "--gpus 0")),
        ("nosecret", ("lacks a Secret", 'secret "not-there" not found')),
        (
            "noimage",
            (
                "nowhere.example/none:1 cannot be pulled",
                "no such host",
                "MINICPMV_FINETUNE_REGISTRY",
                "images.pull_secrets",
            ),
        ),
        ("hungry", ()),
    ],
)
def test_recorded_pods_that_wait(step: str, parts: tuple[str, ...], profile: Profile) -> None:
    sentence = why_waiting(read_pods()[step], "train", profile)
    assert all(part in sentence for part in parts)
    assert bool(sentence) == bool(parts)


@pytest.mark.parametrize(
    ("pod", "part"),
    [
        (_unscheduled("0/3 nodes are available: 3 Insufficient memory."), "steps.train.memory"),
        (
            _unscheduled("0/3 nodes are available: 3 node(s) had untolerated taint {gpu: true}."),
            "steps.train.tolerations",
        ),
        (
            _unscheduled("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."),
            "node_selector",
        ),
        (
            _unscheduled('persistentvolumeclaim "base-models" not found'),
            "the claim base-models is missing or not bound",
        ),
        (_unscheduled("pod has unbound immediate PersistentVolumeClaims"), "the claim is missing or not bound"),
        (_unscheduled("", "SchedulingGated"), "held back by a queue"),
        (_waits("CreateContainerConfigError", "couldn't find key url in Secret team/x"), "couldn't find key url"),
        (_waits("CreateContainerConfigError", 'configmap "ca" not found'), "lacks a ConfigMap"),
        (
            _waits("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
            "cannot be started (CreateContainerConfigError: container has runAsNonRoot",
        ),
        (
            _unscheduled("0/3 nodes are available: 3 node(s) had volume node affinity conflict."),
            "no node that it may use reaches its volume",
        ),
        (_waits("CrashLoopBackOff", "back-off 10s"), "CrashLoopBackOff"),
        (_waits("InvalidImageName", 'couldn\'t parse image "A:b"'), "cannot be pulled"),
    ],
)
def test_other_reasons_to_wait(pod: dict[str, Any], part: str, profile: Profile) -> None:
    assert part in why_waiting(pod, "train", profile)


def test_a_container_that_is_being_created_waits_only_if_kubernetes_warns(profile: Profile) -> None:
    pod = _waits("ContainerCreating")
    assert why_waiting(pod, "train", profile) == ""
    assert "a volume cannot be mounted" in why_waiting(pod, "train", profile, ["FailedMount: claim not bound"])


def test_a_step_without_settings_of_its_own_names_the_default_as_the_remedy(profile: Profile) -> None:
    assert "default.memory" in why_waiting(_unscheduled("1 Insufficient memory"), "notify", profile)


def test_the_recorded_pod_that_ran_out_of_memory(profile: Profile) -> None:
    pod = read_pods()["hungry"]
    limit = profile.step_settings("train").memory[1]
    assert f"limit of {limit} (OOMKilled); raise steps.train.memory" in why_died(pod, "train", profile)
    own = {**pod, "spec": {"containers": [{"name": "main", "resources": {"limits": {"memory": "8Gi"}}}]}}
    assert "limit of 8Gi" in why_died(own, "train", profile)


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "5Gi".'},
            "train.scratch",
        ),
        ({"reason": "Evicted", "message": "The node was low on resource: memory."}, "train.memory"),
        (
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "shared-memory" exceeds the limit'},
            "shared_memory",
        ),
        ({"reason": "DeadlineExceeded", "message": "Pod was active too long"}, "train.timeout_seconds"),
        ({"reason": "NodeLost", "message": "node1 is gone"}, "NodeLost: node1 is gone"),
        ({"containerStatuses": [{"name": "main", "state": {"terminated": {"reason": "Error", "exitCode": 1}}}]}, ""),
    ],
)
def test_other_reasons_to_die(status: dict[str, Any], part: str, profile: Profile) -> None:
    sentence = why_died({"status": {"phase": "Failed", **status}}, "train", profile)
    assert part in sentence
    assert bool(sentence) == bool(part)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("main: OOMKilled (exit code 1)", "steps.train.memory"),
        ("pod deleted", "its pod was deleted"),
        ("Pod was active on the node longer than the specified deadline", "steps.train.timeout_seconds"),
        ("The node was low on resource: ephemeral-storage.", "steps.train.scratch"),
        ('pods "x" is forbidden: exceeded quota: gpus, requested: 1', "raise the namespace's quota"),
        ("error looking up service account kubeflow/minicpmv-finetune: not found", "service account that exists"),
        ("main: Error (exit code 1)", ""),
        ("something new", "something new"),
    ],
)
def test_argos_message_explains_a_pod_that_is_gone(message: str, part: str, profile: Profile) -> None:
    sentence = why_node_ended(message, "train", profile)
    assert part in sentence
    assert bool(sentence) == bool(part)
