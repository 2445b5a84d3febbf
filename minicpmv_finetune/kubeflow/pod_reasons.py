"""Why a pod waits or died, in a sentence with the remedy, from what Kubernetes and Argo report.

Kubernetes says it in a pod's conditions, in the state of its containers and in events; Argo repeats some of it in the
message of the pod's node, which stays when the pod is gone. The sentences name the field of the profile to change.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minicpmv_finetune import environment
from minicpmv_finetune.kubernetes_terms import cannot_be_pulled, why_container_waits

from .profile import Profile

Record = Mapping[str, Any]

_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)"', re.IGNORECASE)
_INSUFFICIENT = re.compile(r"Insufficient ([\w./-]*\w)")
_IMAGE = re.compile(r'image "([^"]+)"')


def why_waiting(pod: Record, step: str, profile: Profile, warnings: Sequence[str] = ()) -> str:
    """Why a pod has not started, with the remedy.

    Args:
        pod: The pod, as Kubernetes returns it.
        step: The step that it belongs to.
        profile: The settings of the cluster.
        warnings: Kubernetes' warnings about the pod, newest last.

    Returns:
        A sentence; empty if the pod runs, has ended, or is being started as usual.
    """
    status = pod.get("status", {})
    if status.get("phase") not in ("Pending", None):
        return ""
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _why_unscheduled(condition, step, profile)
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
        if why_container_waits(reason):
            return _why_container_waits(reason, message, profile)
    return _why_warned(warnings[-1]) if warnings else ""


def why_died(pod: Record, step: str, profile: Profile) -> str:
    """Why a pod ended before its step could say it, with the remedy.

    Returns:
        A sentence; empty if the pod has not failed, or if the step ended by itself and its log says why.
    """
    status = pod.get("status", {})
    if status.get("phase") != "Failed":
        return ""
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "")
    if reason == "Evicted":
        return _why_evicted(message, step, profile)
    if reason == "DeadlineExceeded":
        return _why_too_long(step, profile)
    for container in status.get("containerStatuses") or []:
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended.get("reason") == "OOMKilled":
            return _why_out_of_memory(_limit(pod, container["name"]), step, profile)
    return f"{reason}: {message}" if reason and reason not in ("Error", "Completed") else ""


def why_node_ended(message: str, step: str, profile: Profile) -> str:
    """The same from the message of the pod's node in the Workflow, for a pod that is gone or was never created.

    Returns:
        A sentence; empty if the message only says that the step ended with an exit code.
    """
    if "OOMKilled" in message:
        return _why_out_of_memory("", step, profile)
    if "active on the node longer than" in message or "DeadlineExceeded" in message:
        return _why_too_long(step, profile)
    if re.search(r"Evicted|low on resource|ephemeral|exceeds the limit", message):
        return _why_evicted(message, step, profile)
    if message == "pod deleted":
        return "its pod was deleted, by somebody or with its node; Argo starts such a pod again as often as it may."
    if "error looking up service account" in message:
        return (
            f"{message.rstrip('. ')}; give the profile a service account that exists where the server runs its pods "
            "(`minicpmv-finetune preflight` names that namespace)."
        )
    if "exceeded quota" in message:
        return f"{message.rstrip('. ')}; raise the namespace's quota, or lower what {_field(step, profile)} requests."
    if re.fullmatch(r"(main: )?Error \(exit code \d+\)|child .* failed|", message):
        return ""
    return message


def _why_unscheduled(condition: Record, step: str, profile: Profile) -> str:
    message = str(condition.get("message") or "").split(" preemption:")[0].rstrip(" .,")
    field = _field(step, profile)
    if condition.get("reason") == "SchedulingGated":
        return "its pod is held back by a queue until there is quota (Kueue); see `kubectl get workloads`."
    if claim := _CLAIM.search(message) or re.search("PersistentVolumeClaim", message):
        named = f" {claim[1]}" if claim.re is _CLAIM else ""
        return (
            f"the claim{named} is missing or not bound ({message}); create it, or check its storage class with "
            "`kubectl get pvc`."
        )
    if short := sorted(set(_INSUFFICIENT.findall(message))):
        remedies = {"cpu": f"{field}.cpu", "memory": f"{field}.memory", "ephemeral-storage": f"{field}.scratch"}
        remedy = next((f"lower {remedies[name]}" for name in short if name in remedies), "")
        if devices := [name for name in short if "/" in name]:
            remedy = (
                f"check with `kubectl describe nodes` that a node offers {devices[0]} and that it is free, correct "
                f"{field}.accelerator, or run without by --gpus 0"
            )
        return f"no node has enough {', '.join(short)} ({message}); {remedy or 'use larger nodes'}."
    if "untolerated taint" in message:
        return f"no node accepts its pod ({message}); add the taint to {field}.tolerations."
    if "volume node affinity" in message:
        return (
            f"no node that it may use reaches its volume ({message}); use a storage class whose volumes are made where "
            "the pod runs (WaitForFirstConsumer)."
        )
    if "node affinity" in message or "node selector" in message:
        return f"no node fits its labels ({message}); correct {field}.node_selector."
    return f"no node accepts its pod ({message or condition.get('reason')})."


def _why_container_waits(reason: str, message: str, profile: Profile) -> str:
    if cannot_be_pulled(reason):
        image = _IMAGE.search(message)
        cause = message.rpartition(": ")[2] or reason
        return (
            f"its container image {image[1] if image else ''} cannot be pulled ({cause}); push it, name its registry "
            f"({environment.REGISTRY}, --registry, or `images` of the profile), or the registry's credentials in "
            "images.pull_secrets."
        )
    named = re.search("configmap|secret", message, re.IGNORECASE)
    if reason == "CreateContainerConfigError" and named:
        kind = "Secret" if named[0].lower() == "secret" else "ConfigMap"
        return f"its container lacks a {kind} or one of its keys ({message}); create it in {profile.namespace}."
    return f"its container cannot be started ({reason}: {message})."


def _why_warned(warning: str) -> str:
    if "FailedMount" in warning or "FailedAttachVolume" in warning:
        return f"a volume cannot be mounted ({warning}); check the claims and Secrets that its profile mounts."
    return f"{warning}."


def _why_out_of_memory(limit: str, step: str, profile: Profile) -> str:
    limit = limit or profile.step_settings(_plain(step)).memory[1]
    return (
        f"killed because it needed more memory than its limit of {limit} (OOMKilled); raise {_field(step, profile)}"
        ".memory in the profile."
    )


def _why_evicted(message: str, step: str, profile: Profile) -> str:
    part = "shared_memory" if "shared-memory" in message else "memory" if "resource: memory" in message else "scratch"
    return f"evicted from its node ({message.rstrip('. ')}); raise {_field(step, profile)}.{part} in the profile."


def _why_too_long(step: str, profile: Profile) -> str:
    seconds = profile.step_settings(_plain(step)).timeout_seconds
    return (
        f"stopped at its time limit of {seconds} s; raise {_field(step, profile)}.timeout_seconds in the profile. A "
        "training continues from its newest checkpoint when it is started again."
    )


def _limit(pod: Record, container: str) -> str:
    for found in pod.get("spec", {}).get("containers") or []:
        if found.get("name") == container:
            return str((found.get("resources", {}).get("limits") or {}).get("memory") or "")
    return ""


def _containers(status: Record) -> list[Record]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _plain(step: str) -> str:
    return step.partition("[")[0]


def _field(step: str, profile: Profile) -> str:
    """Where the profile has the settings of a step."""
    return f"steps.{_plain(step)}" if _plain(step) in profile.steps else "default"
