"""Why steps of a run failed or wait: put together from Kubernetes, from their logs, and from what they left behind.

The server's API says neither: `error` of runs and tasks stays empty, and a run that waits for a GPU that no node has is
RUNNING. So what Kubernetes did to a pod comes first (killed, evicted, not started), then the step's own sentence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import kfp_server_api

from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.kubernetes_terms import RUN_LABEL

from .client import Cluster
from .pod_reasons import why_died, why_node_ended
from .pod_reasons import why_waiting as why_pod_waits
from .pods import Namespace, NoAccessError, Pod, Record
from .run_steps import StepRow, list_steps, step_of_path
from .step_logs import last_error, read_log, stored_sentence


@dataclass(frozen=True)
class _Observed:
    """What Kubernetes knows of a run.

    Attributes:
        namespace: Where to ask further; None if Kubernetes cannot be asked.
        pods: The run's pods, oldest first.
        workflow: The run's Workflow; empty if it is gone or may not be read.
        obstacle: Why Kubernetes does not help; empty if it does.
    """

    namespace: Namespace | None = None
    pods: list[Pod] = field(default_factory=list)
    workflow: Record = field(default_factory=dict)
    obstacle: str = ""


def explained_steps(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> list[StepRow]:
    """The steps of a run; those that failed, wait, or train on several nodes with a message."""
    steps = list_steps(run)
    if all(step.state in ("SUCCEEDED", "SKIPPED", "CANCELED") for step in steps):
        return steps
    observed = _observe(cluster, run)
    return [replace(step, message=_message(cluster, run, step, observed)) for step in steps]


def why_waiting(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> list[str]:
    """A sentence for each pod of a run that waits for its start, or how to see it if Kubernetes cannot be asked."""
    observed = _observe(cluster, run)
    if observed.obstacle:
        return [f"a pod has not started yet: {_how_to_see(cluster, run, observed)}"]
    if not _nodes(observed) and not observed.pods:
        return [_why_not_begun(observed)]
    found = [(pod.step, _why_pod_waits(cluster, observed, pod)) for pod in observed.pods]
    return [f"{step}: {sentence}" for step, sentence in found if sentence] + [
        f"{step}: {sentence}" for step, sentence in _pods_not_created(cluster, observed)
    ]


def why_no_step(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> str:
    """Why no step of a run has started, whether it waits or has failed; empty if that is not known."""
    if run.state in ("SUCCEEDED", "SKIPPED", "CANCELED", "CANCELING"):
        return ""
    return why_without_step(cluster, run) if run.state == "FAILED" else " ".join(why_waiting(cluster, run))


def why_without_step(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> str:
    """Why a run failed before any of its steps started; empty if that is not known."""
    observed = _observe(cluster, run)
    messages = [str(node.get("message") or "") for node in _nodes(observed) if node.get("phase") in ("Failed", "Error")]
    found = (why_node_ended(message, "", cluster.profile) for message in messages)
    return next(filter(None, found), observed.obstacle and _how_to_see(cluster, run, observed))


def stopped_workflows(cluster: Cluster, run_ids: Sequence[str]) -> set[str]:
    """Those of some failed runs that somebody stopped, as far as their Workflows still exist and may be read."""
    try:
        workflows = Namespace(cluster.profile).workflows(run_ids)
    except NoAccessError:
        return set()
    # Kubeflow stops a Workflow by setting its time limit to 0.
    return {run_id for run_id, found in workflows.items() if found.get("spec", {}).get("activeDeadlineSeconds") == 0}


def _observe(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> _Observed:
    try:
        namespace = Namespace(cluster.profile)
        pods = namespace.pods(run.run_id)
    except NoAccessError as error:
        return _Observed(obstacle=str(error))
    try:
        workflow = namespace.workflows([run.run_id]).get(run.run_id, {})
    except NoAccessError:
        workflow = {}
    # A server with a single user has its runs in its own namespace, whatever the profile says.
    obstacle = "" if pods or workflow else f"namespace {namespace.name} has no pod of this run"
    return _Observed(namespace, pods, workflow, obstacle)


def _message(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow, observed: _Observed) -> str:
    if step.state == "FAILED" or (step.state == "RUNNING" and step.pod_state == "FAILED"):
        sentence = _why_failed(cluster, run, step, observed)
        # Argo looks at a failed pod only after the wait before an attempt.
        return sentence if step.state == "FAILED" else f"attempt {step.attempts} failed: {sentence}"
    pod = next((pod for pod in observed.pods if pod.node == step.pod), None)
    if step.state == "PENDING":
        if observed.obstacle:
            return _how_to_see(cluster, run, observed)
        return _why_pod_waits(cluster, observed, pod) if pod else ""
    if step.state == "RUNNING" and step.name == "train" and observed.namespace:
        return _progress(observed.namespace, run)
    return ""


def _why_failed(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow, observed: _Observed) -> str:
    for pod in observed.pods:
        if pod.node == step.pod and (sentence := why_died(pod.record, step.step, cluster.profile)):
            return sentence
    try:
        sentence = last_error(read_log(cluster, run, step))
    except (UserError, RetryableError):
        sentence = ""
    sentence = sentence or stored_sentence(cluster, run, step)
    if not sentence:
        messages = [str(node.get("message") or "") for node in _nodes(observed) if _belongs_to(node, step)]
        sentences = (why_node_ended(message, step.step, cluster.profile) for message in messages)
        sentence = next(filter(None, sentences), "")
    if sentence or not observed.obstacle:
        return sentence or "see its log"
    return _how_to_see(cluster, run, observed)


def _belongs_to(node: Mapping[str, Any], step: StepRow) -> bool:
    """Whether a node of the Workflow is a step's newest pod, or one of the driver that failed."""
    driver = str(node.get("displayName") or "").partition("(")[0] if step.step.endswith("-driver") else ""
    return node.get("id") == step.pod or driver == step.step


def _why_pod_waits(cluster: Cluster, observed: _Observed, pod: Pod) -> str:
    sentence = why_pod_waits(pod.record, pod.step, cluster.profile)
    if sentence or pod.record.get("status", {}).get("phase") != "Pending" or observed.namespace is None:
        return sentence
    try:
        warnings = observed.namespace.warnings(pod.name)
    except NoAccessError:
        return ""
    return why_pod_waits(pod.record, pod.step, cluster.profile, warnings)


def _pods_not_created(cluster: Cluster, observed: _Observed) -> Iterator[tuple[str, str]]:
    """Nodes of the Workflow whose pod Kubernetes refuses to create, for example because of a quota."""
    existing = {pod.node for pod in observed.pods}
    for node in _nodes(observed):
        message = str(node.get("message") or "")
        if node.get("type") == "Pod" and node.get("phase") == "Pending" and node.get("id") not in existing and message:
            step = step_of_path(str(node.get("name") or ""))
            if sentence := why_node_ended(message, step, cluster.profile):
                yield step, sentence


def _why_not_begun(observed: _Observed) -> str:
    """Why a Workflow has no node yet: its controller says so, as where too many run at once, or does not work."""
    status = observed.workflow.get("status", {})
    if message := str(status.get("message") or "").rstrip(". "):
        return f"the run has not begun: {message}."
    return (
        "the run has not begun: Argo's controller has not taken it up; see whether the Deployment workflow-controller "
        "runs, where Kubeflow Pipelines is installed."
    )


def _nodes(observed: _Observed) -> list[Mapping[str, Any]]:
    nodes = list((observed.workflow.get("status", {}).get("nodes") or {}).values())
    return sorted(nodes, key=lambda node: str(node.get("startedAt") or ""))


def _progress(namespace: Namespace, run: kfp_server_api.V2beta1Run) -> str:
    """How far the training on several nodes is, where Trainer's gate `TrainJobStatus` makes the nodes say it."""
    try:
        status = namespace.train_job(run.run_id).get("status", {}).get("trainerStatus") or {}
    except NoAccessError:
        return ""
    parts = []
    if (percent := status.get("progressPercentage")) is not None:
        parts.append(f"{percent} %")
    parts += [f"loss {_rounded(item['value'])}" for item in status.get("metrics") or [] if item.get("name") == "loss"]
    if (seconds := status.get("estimatedRemainingSeconds")) is not None:
        parts.append(f"{seconds // 60} min left" if seconds >= 60 else f"{seconds} s left")
    return ", ".join(parts)


def _rounded(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _how_to_see(cluster: Cluster, run: kfp_server_api.V2beta1Run, observed: _Observed) -> str:
    why = f"Kubeflow does not say why, and {observed.obstacle}"
    # Kubernetes was asked, and has nothing of the run.
    if observed.namespace and run.state in ("SUCCEEDED", "FAILED"):
        # Its log was looked for too, and that command says where.
        return (
            f"{why} any more, which a stock Kubeflow deletes an hour after its end; see `minicpmv-finetune logs "
            f"{run.run_id}`."
        )
    return f"{why}; see `kubectl -n {cluster.profile.namespace} describe pods -l {RUN_LABEL}={run.run_id}`."
