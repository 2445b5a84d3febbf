"""The steps of a run, found in the flat list of tasks that the server keeps of it.

The server lists every node of the run's Argo Workflow: a step `train` appears as `train`, `train(0)`, `train-driver`,
`train-driver(0)`, `executor`, `executor(0)` and, if Argo has started its pod again, `executor(1)`. An entry names
neither itself nor its parent, only the ids of its children. But an id is a hash of the node's path, such as
`finetune-x7k2p(0).root(0).train(0).executor(1)`, so the tree can be rebuilt: a path exists if its id is listed. A node
with an `executor` below it is a step, and `executor(0)`, `executor(1)`, … are its pods.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count, takewhile
from typing import Any

import kfp_server_api

_NUMBER = re.compile(r"\(\d+\)$")
_NUMBERS = re.compile(r"\(\d+\)(?=\.|$)")
_ITERATION = re.compile(r"\((\d+):[^)]*\)")
_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class StepRow:
    """One step of a run.

    Attributes:
        step: Name of the step; in a loop with its number, such as preprocess-part[0].
        state: State on the server, such as RUNNING; PENDING while its pod has not started.
        attempts: Number of pods that were created for it.
        seconds: Duration so far; None if the step has not started.
        pod: Id of its newest pod's node in the Workflow, whose last part the pod's name ends with too; empty if there
            is none.
        pod_state: State of this pod, which fails up to a minute before the step; empty if it is not known.
        message: Why the step failed or waits, or how far it is; empty if that is not known.
    """

    step: str
    state: str
    attempts: int
    seconds: int | None
    pod: str
    pod_state: str = ""
    message: str = ""

    @property
    def name(self) -> str:
        """The step's name without its number in a loop."""
        return self.step.partition("[")[0]


def list_steps(run: kfp_server_api.V2beta1Run) -> list[StepRow]:
    """The steps of a run in the order in which they started, without the tasks that Kubeflow adds."""
    tree = _Tree(_tasks(run))
    found = [tree.row(executors) for executors in tree.executors_by_step().values()]
    found += _failed_drivers(tree.tasks)
    rows = [row for _, row in sorted(found, key=lambda item: item[0])]
    # The step that a cancelled run was at has failed for the server.
    stopped = run.state == "CANCELED"
    return [replace(row, state="CANCELED") if stopped and row.state != "SUCCEEDED" else row for row in rows]


def workflow_name(run: kfp_server_api.V2beta1Run) -> str:
    """The name of the run's Argo Workflow; empty as long as the server knows no task of the run."""
    return _Tree(_tasks(run)).workflow


def waiting_since(run: kfp_server_api.V2beta1Run) -> datetime | None:
    """Since when a pod of the run, or the run itself, waits for its start; None if none does."""
    if not _tasks(run):
        return run.created_at if run.state in (None, "PENDING", "RUNNING") else None
    pods = [task for task in _tasks(run) if not task.child_tasks and _NUMBER.search(task.display_name or "")]
    return min((task.start_time for task in pods if task.state == "PENDING" and task.start_time), default=None)


def node_id(workflow: str, path: str) -> str:
    """The id that Argo gives to the node with this path: the workflow's name and the path's 32-bit FNV-1a hash."""
    digest = 0x811C9DC5
    for byte in path.encode():
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{workflow}-{digest}"


def step_of_path(path: str) -> str:
    """The name of the step to which an Argo node belongs, as `StepRow.step` has it; a driver belongs to its step."""
    *parents, last = path.split(".")
    own = parents[-1] if parents and _NUMBER.sub("", last) == "executor" else last
    iterations = _ITERATION.findall(path)
    return _NUMBER.sub("", own).removesuffix("-driver") + (f"[{iterations[-1]}]" if iterations else "")


def pod_name(node: str, specification: Mapping[str, Any], step: str) -> str:
    """The name of a node's pod: Argo writes the name of the node's template between the workflow and the hash.

    Args:
        node: The node's id.
        specification: The run's pipeline with its settings for Kubernetes, as the server returns it.
        step: Name of the step.

    Returns:
        The name; the id if the pipeline has no such step.
    """
    pipeline = specification.get("pipeline_spec", specification)
    graphs = [pipeline.get("root", {}), *pipeline.get("components", {}).values()]
    tasks = {name: task for graph in graphs for name, task in graph.get("dag", {}).get("tasks", {}).items()}
    if step not in tasks:
        return node
    component = pipeline["components"][tasks[step]["componentRef"]["name"]]
    platform = specification.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {})
    executors = platform.get("deploymentSpec", {}).get("executors", {})
    metadata = executors.get(component.get("executorLabel"), {}).get("podMetadata")
    template = "retry-system-container-impl" if "retryPolicy" in tasks[step] else "system-container-impl"
    if metadata is not None:
        template = f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-{template}"
    workflow, _, digest = node.rpartition("-")
    return f"{workflow}-{template}-{digest}"


class _Tree:
    """The nodes of a Workflow, by the tasks that the server lists."""

    def __init__(self, tasks: Sequence[Any]) -> None:
        self.tasks = tasks
        self.ids = {child for task in tasks for child in _children(task)}
        self.workflow = next(iter(self.ids), "").rpartition("-")[0]
        self._names = sorted({_NUMBER.sub("", task.display_name) for task in tasks if task.display_name})

    def executors_by_step(self) -> dict[str, list[str]]:
        """The paths of each step's nodes `executor`: one, and another one each time that Argo began the step again."""
        steps: dict[str, list[str]] = {}
        for path in self._executors(self.workflow):
            steps.setdefault(_NUMBERS.sub("", path), []).append(path)
        return steps

    def row(self, executors: Sequence[str]) -> tuple[datetime, StepRow]:
        """When a step started, and the step, by its nodes `executor`."""
        step = _NUMBER.sub("", executors[-1].rpartition(".")[0])
        task, executor = self._parent_of(self._attempts(step)), self._parent_of(self._attempts(executors[-1]))
        pods = [pod for path in executors for pod in self._attempts(path)]
        state = (task and task.state) or "PENDING"
        pod_state = self._state_of_pod(executor) if executor else ""
        if state == "RUNNING" and pod_state == "PENDING":
            state = "PENDING"
        start, end = (task.start_time, task.end_time) if task else (None, None)
        pod = node_id(self.workflow, pods[-1]) if pods else ""
        return start or _NEVER, StepRow(step_of_path(step), state, len(pods), duration(start, end), pod, pod_state)

    def _executors(self, path: str) -> Iterator[str]:
        for attempt in self._attempts(path):
            for child in (f"{attempt}.{name}" for name in self._names):
                if node_id(self.workflow, child) not in self.ids:
                    continue
                if child.endswith(".executor"):
                    yield child
                else:
                    yield from self._executors(child)

    def _attempts(self, path: str) -> list[str]:
        numbered = (f"{path}({number})" for number in count())
        return list(takewhile(lambda attempt: node_id(self.workflow, attempt) in self.ids, numbered))

    def _parent_of(self, paths: Sequence[str]) -> Any:
        """The task with one of these nodes as its child."""
        wanted = {node_id(self.workflow, path) for path in paths}
        named = _NUMBER.sub("", paths[0].rpartition(".")[2]) if paths else ""
        return next((task for task in self.tasks if task.display_name == named and wanted & _children(task)), None)

    def _state_of_pod(self, executor: Any) -> str:
        """The state of an executor's newest pod, whose entry is known by its name and its time alone."""
        name = f"executor({len(_children(executor)) - 1})"
        end = executor.end_time if _is_known(executor.end_time) else _NEVER
        during = [
            task
            for task in self.tasks
            if task.display_name == name and task.start_time and executor.start_time <= task.start_time <= end
        ]
        return str(during[0].state) if during else ""


def _failed_drivers(tasks: Sequence[Any]) -> list[tuple[datetime, StepRow]]:
    """Kubeflow's own pods before a step, which are hidden unless one of them failed."""
    drivers = [task for task in tasks if (task.display_name or "").endswith("-driver") and task.state == "FAILED"]
    newest = {task.display_name: task for task in sorted(drivers, key=lambda task: task.start_time or _NEVER)}
    return [
        (
            task.start_time or _NEVER,
            StepRow(name, "FAILED", len(pods), duration(task.start_time, task.end_time), pods[-1]),
        )
        for name, task in newest.items()
        if (pods := [child.pod_name or "" for child in task.child_tasks or []])
    ]


def duration(start: datetime | None, end: datetime | None) -> int | None:
    """Whole seconds from start to end, or until now; None if the start is not known."""
    if start is None or not _is_known(start):
        return None
    return max(round(((end if end and _is_known(end) else datetime.now(UTC)) - start).total_seconds()), 0)


def _is_known(time: datetime | None) -> bool:
    # The server sends a time that is not known yet as the first second of 1970 or of the year 1, or not at all.
    return time is not None and time.year > 1970


def _tasks(run: kfp_server_api.V2beta1Run) -> Sequence[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _children(task: Any) -> set[str]:
    return {child.pod_name for child in task.child_tasks or [] if child.pod_name}
