"""Why the nodes of a TrainJob wait, for a person: from their pods, and from their Job's events where there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpmv_finetune.kubernetes_terms import why_container_waits

from .trainjob_cluster import CONTAINER

if TYPE_CHECKING:
    from kubernetes.client import V1ContainerStatus, V1Pod

_RESTART_LABEL = "jobset.sigs.k8s.io/restart-attempt"


def container_status(pod: "V1Pod") -> "V1ContainerStatus | None":
    """The status of the container that trains."""
    statuses = pod.status.container_statuses or []
    return next((status for status in statuses if status.name == CONTAINER), None)


@dataclass(frozen=True)
class Reason:
    """Why a node waits.

    Attributes:
        kind: The kind of obstacle, which stays the same while its message changes.
        message: What Kubernetes says of it now.
    """

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.message})"


def waiting_reasons(pods: Sequence["V1Pod"], events: Sequence[str]) -> list[Reason]:
    """Why nodes wait, each kind of reason once.

    Args:
        pods: The nodes' pods.
        events: Messages of the Job that could not create pods; if there are pods, warnings about those that wait.
    """
    found = [reason for pod in pods if (reason := _reason(pod))]
    kind = "a node is not started yet" if pods else "Kubernetes refuses to create the nodes' pods"
    return list({reason.kind: reason for reason in found or [Reason(kind, _shorten(text)) for text in events]}.values())


def _reason(pod: "V1Pod") -> Reason | None:
    if pod.status.phase != "Pending":
        return None
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            why = condition.message or condition.reason or "unscheduled"
            return Reason("a node waits for a machine", _shorten(why))
    status = container_status(pod)
    waiting = status.state.waiting if status and status.state else None
    if waiting is not None and (why := why_container_waits(waiting.reason or "")):
        return Reason(f"a node waits because {why}", _shorten(waiting.message or waiting.reason))
    return None


def _shorten(message: str) -> str:
    return " ".join(message.split()).rstrip(".")[:300]


def restarts(pods: Sequence["V1Pod"]) -> int:
    """How often all nodes were started again: JobSet counts on the pods' labels."""
    counts = [(pod.metadata.labels or {}).get(_RESTART_LABEL, "0") for pod in pods]
    return max((int(count) for count in counts if count.isdigit()), default=0)


def describe_state(
    suspended: Mapping[str, Any] | None,
    pods: Sequence["V1Pod"],
    nodes: int,
    most_restarts: int | None,
    why: Sequence[str],
) -> str:
    """A TrainJob's state, for a person who waits.

    Args:
        suspended: The condition that it is suspended, if it is.
        pods: The nodes' pods.
        nodes: The number of nodes.
        most_restarts: How often JobSet starts all nodes again; None if that is not known.
        why: Why nodes wait, as far as that is known.
    """
    if suspended:
        return f"suspended ({suspended.get('message') or suspended.get('reason')})"
    state = f"{sum(pod.status.phase == 'Running' for pod in pods)} of {nodes} nodes run"
    if count := restarts(pods):
        state += f", restart {count}" + (f" of {most_restarts}" if most_restarts else "")
    return "; ".join([state, *why])


def out_of_memory(pods: Sequence["V1Pod"]) -> dict[str, str]:
    """The memory limit of each node that ended out of memory, by the id of its pod."""
    found = {}
    for pod in pods:
        status = container_status(pod)
        ended = status.state.terminated if status and status.state else None
        if ended is not None and ended.reason == "OOMKilled":
            container = next((one for one in pod.spec.containers if one.name == CONTAINER), None)
            limits = (container.resources.limits if container and container.resources else None) or {}
            found[str(pod.metadata.uid)] = str(limits.get("memory", "the machine's memory"))
    return found
