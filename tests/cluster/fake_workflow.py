"""What Argo makes of a compiled pipeline: nodes, attempts and pods, and the tasks that Kubeflow's API lists for them.

Each behavior names the recording (below recordings/objects) that shows it:

- each step is a retry node, its attempt, the same for `executor` inside, and a driver before: run-digits-1;
- a deleted pod is another attempt of `executor`: run-kill-1; a container that fails is not repeated, with whatever
  code: run-exit-75-with-set-retry-3, run-out-of-memory;
- steps after a failed one have entries without a state, those behind them inside a condition have none: run-sdk-doc;
- a condition that does not hold is SKIPPED, and what is inside is not listed: run-retrain-2;
- the exit handler runs after a failure too: run-retrain-bad;
- a step whose pod cannot start is RUNNING, its pod PENDING, and what does not depend on it goes on: run-waiting;
- a person's retry begins the failed attempts again and keeps what succeeded: run-retried-by-hand;
- a loop has an entry for each iteration: run-partitions.

A node's id is the workflow's name and a hash of the node's own name; its pod is called by the workflow, the template
and this hash (recorded pods), and the API only lists the ids, as `child_tasks`.
"""

import json
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
Play = Generator[None, None, str]  # pauses after each step; its value is the state in which it ends
_NO_TIME = "0001-01-01T00:00:00Z"  # recorded as the end of what has not ended
_OMITTED = ""


@dataclass
class Node:
    """One node of Argo's tree.

    Attributes:
        name: Its path, which is unique.
        shown: The last part of the path.
        template: The template that it runs.
        kind: "Pod" or "Group".
        step: The step that it belongs to; empty around the steps.
        history: Its states so far with their times, each once in a row.
        children: Names of the nodes that come after it.
    """

    name: str
    shown: str
    template: str
    kind: str
    step: str
    created: str
    started: str
    ended: str = _NO_TIME
    history: list[Record] = field(default_factory=list)
    children: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        return str(self.history[-1].get("state", _OMITTED)) if self.history else _OMITTED


@dataclass
class FakeWorkflow:
    """A run's workflow, which goes on by one step each time `advance` is called.

    Attributes:
        name: The workflow's name.
        spec: The compiled pipeline, with or without its platform's document.
        outcomes: How the attempts of a step end, by step: a state, or one state for each attempt; PENDING never starts.
        skipped: Conditions that do not hold.
        now: Returns the present time.
    """

    name: str
    spec: Record
    outcomes: Mapping[str, str | list[str]]
    skipped: set[str]
    now: Callable[[], str]
    nodes: dict[str, Node] = field(default_factory=dict)
    _play: Iterator[None] | None = None

    def advance(self) -> str:
        """Go on by one step; returns the state of the whole."""
        if self._play is None:
            self._play = self._run()
        next(self._play, None)
        return self.nodes[self.name].state

    def retry(self) -> None:
        """What a person's Retry does."""
        self.nodes = {name: node for name, node in self.nodes.items() if node.state != _OMITTED}
        self._play = self._run()

    def cancel(self) -> None:
        """End what runs as failed, as `terminate` does."""
        for node in self.nodes.values():
            if node.state in {"RUNNING", "PENDING"}:
                self._set(node, "FAILED")
        self._play = iter(())

    def pods(self) -> dict[str, Node]:
        """The nodes that are pods, by the pod's name."""
        return {
            f"{self.name}-{node.template}-{_hash(node.name)}": node
            for node in self.nodes.values()
            if node.kind == "Pod"
        }

    def tasks(self, run_id: str) -> list[Record]:
        """What the API lists, in the order of the tasks' ids: any."""
        listed = [self._task(run_id, node) for node in self.nodes.values()]
        # Beside the nodes: entries of the metadata store without a name and a state, for some of the finished steps.
        listed += [
            {
                "run_id": run_id,
                "task_id": _task_id(run_id, f"execution {node.name}"),
                "create_time": node.started,
                "start_time": node.started,
                "end_time": node.ended,
                "execution_id": str(number),
            }
            for number, node in enumerate(self.nodes.values())
            if node.shown == "executor" and node.step in {"preprocess", "train", "merge"} and node.ended != _NO_TIME
        ]
        return sorted(listed, key=lambda task: str(task["task_id"]))

    def _task(self, run_id: str, node: Node) -> Record:
        task = {
            "run_id": run_id,
            "task_id": _task_id(run_id, node.name),
            "display_name": node.shown,
            "create_time": node.created,
            "start_time": node.started,
            "end_time": node.ended,
            "state": node.state or None,
            "state_history": list(node.history),
            "child_tasks": [{"pod_name": self.node_id(name)} for name in node.children] or None,
        }
        return {name: value for name, value in task.items() if value is not None}

    def node_id(self, name: str) -> str:
        return name if name == self.name else f"{self.name}-{_hash(name)}"

    def _run(self) -> Play:
        pipeline = self.spec.get("pipeline_spec", self.spec)
        top = self._open("", self.name, "entrypoint")
        self._pass(top, f"{top}.root-driver", "system-dag-driver")
        inside = self._open(f"{top}.root-driver(0)", f"{top}.root", "root")
        state = yield from self._dag(pipeline, pipeline["root"]["dag"]["tasks"], inside)
        self._close(f"{top}.root", state)
        self._close(self.name, state)
        return state

    def _dag(self, pipeline: Record, tasks: Record, path: str) -> Play:
        """Run the tasks of one graph."""
        handlers = {name for name, task in tasks.items() if _runs_always(task)}
        left, state = sorted(set(tasks) - handlers), "SUCCEEDED"
        while left and state != "FAILED":
            done = set(tasks) - set(left) - handlers
            ready = [name for name in left if done.issuperset(tasks[name].get("dependentTasks", []))]
            waiting = [name for name in ready if self.outcomes.get(name) == "PENDING"]
            for name in waiting:
                self._begin(pipeline, tasks, path, name)
            if ready == waiting:
                yield
                continue
            name = next(name for name in ready if name not in waiting)
            left.remove(name)
            if (yield from self._one(pipeline, tasks, path, name)) == "FAILED":
                state = "FAILED"
        for name in _in_order(tasks, left):
            self._omit(tasks, path, name)
        for name in sorted(handlers):
            (before,) = tasks[name]["dependentTasks"]
            hook = self._open(f"{path}.{before}", f"{path}.{before}.onExit", f"exit-hook-root-{name}")
            yield from self._one(pipeline, {name: {**tasks[name], "dependentTasks": []}}, hook, name)
            self._close(f"{path}.{before}.onExit", "SUCCEEDED")
        return state

    def _one(self, pipeline: Record, tasks: Record, path: str, name: str) -> Play:
        node = f"{path}.{name}"
        if node in self.nodes and self.nodes[node].state in {"SUCCEEDED", "SKIPPED"}:
            return self.nodes[node].state
        component = pipeline["components"][tasks[name]["componentRef"]["name"]]
        if items := tasks[name].get("parameterIterator"):
            count = len(json.loads(items.get("items", {}).get("raw", "[0, 1]")))
            return (yield from self._loop(pipeline, component, tasks[name], path, name, count))
        if "dag" not in component:
            return (yield from self._step(pipeline, tasks, path, name))
        self._pass_driver(tasks, path, name, "system-dag-driver")
        if name in self.skipped:
            self._add(f"{path}.{name}-driver(0)", node, tasks[name]["componentRef"]["name"], "Group", "", "SKIPPED")
            return "SKIPPED"
        inside = self._open(f"{path}.{name}-driver(0)", node, tasks[name]["componentRef"]["name"])
        state = yield from self._dag(pipeline, component["dag"]["tasks"], inside)
        self._close(node, state)
        return state

    def _loop(self, pipeline: Record, component: Record, task: Record, path: str, name: str, count: int) -> Play:
        template = task["componentRef"]["name"]
        outside = self._open(self._parent(task, path), f"{path}.{name}", template)
        self._pass(outside, f"{outside}.iteration-driver", "system-dag-driver")
        group = f"{outside}.iteration-iterations"
        self._add(f"{outside}.iteration-driver(0)", group, template, "Group", "", "RUNNING")
        state = "SUCCEEDED"
        for number in range(count):
            one = self._open(group, f"{group}({number}:{number})", template)
            self._pass(one, f"{one}.iteration-item-driver", "system-dag-driver")
            inside = self._open(f"{one}.iteration-item-driver(0)", f"{one}.iteration-item", template)
            ended = yield from self._dag(pipeline, component["dag"]["tasks"], inside)
            self._close(f"{one}.iteration-item", ended)
            self._close(f"{group}({number}:{number})", ended)
            state = "FAILED" if ended == "FAILED" else state
        self._set(self.nodes[group], state)
        self._close(f"{path}.{name}", state)
        return state

    def _step(self, pipeline: Record, tasks: Record, path: str, name: str) -> Play:
        inside = self._begin(pipeline, tasks, path, name)
        wanted = self.outcomes.get(name, "SUCCEEDED")
        for number in range(1 if isinstance(wanted, str) else len(wanted)):
            pod = self._attempt(pipeline, tasks[name], inside, name, number)
            self._set(pod, "RUNNING")
            yield
            wanted = self.outcomes.get(name, "SUCCEEDED")
            state = wanted if isinstance(wanted, str) else wanted[number]
            self._set(pod, state)
        self._set(self.nodes[f"{inside}.executor"], state)
        self._close(f"{path}.{name}", state)
        return state

    def _begin(self, pipeline: Record, tasks: Record, path: str, name: str) -> str:
        """The nodes of a step whose first pod does not run yet; returns the path of its attempt."""
        self._pass_driver(tasks, path, name, "system-container-driver")
        template = _template(self.spec, pipeline, tasks[name], "executor")
        inside = self._open(f"{path}.{name}-driver(0)", f"{path}.{name}", template, name)
        self._attempt(pipeline, tasks[name], inside, name, 0)
        return inside

    def _attempt(self, pipeline: Record, task: Record, inside: str, step: str, number: int) -> Node:
        template = _template(self.spec, pipeline, task, "impl")
        executor = self._add(inside, f"{inside}.executor", template, "Group", step, "RUNNING")
        return self._add(executor.name, f"{inside}.executor({number})", template, "Pod", step, "PENDING")

    def _pass_driver(self, tasks: Record, path: str, name: str, template: str) -> None:
        for parent in self._parents(tasks[name], path):
            self._pass(parent, f"{path}.{name}-driver", template)

    def _omit(self, tasks: Record, path: str, name: str) -> None:
        for parent in self._parents(tasks[name], path):
            self._add(parent, f"{path}.{name}-driver", "system-container-driver", "Group", "", _OMITTED)
        self._add(f"{path}.{name}-driver", f"{path}.{name}", "", "Group", name, _OMITTED)

    def _parents(self, task: Record, path: str) -> list[str]:
        """The nodes that a task's driver comes after."""
        before = [f"{path}.{name}" for name in task.get("dependentTasks", [])]
        return [f"{name}(0)" if f"{name}(0)" in self.nodes else name for name in before] or [path]

    def _parent(self, task: Record, path: str) -> str:
        return self._parents(task, path)[0]

    def _open(self, parent: str, name: str, template: str, step: str = "") -> str:
        """Start a node that may be repeated, with its attempt; returns the attempt's path."""
        self._add(parent, name, template, "Group", step, "RUNNING")
        self._add(name, f"{name}(0)", template, "Group", step, "RUNNING")
        return f"{name}(0)"

    def _close(self, name: str, state: str) -> None:
        for node in (self.nodes.get(f"{name}(0)"), self.nodes[name]):
            if node:
                self._set(node, state)

    def _pass(self, parent: str, name: str, template: str) -> None:
        """Run a driver."""
        driver = self._add(parent, name, template, "Group", "", "RUNNING")
        pod = self._add(name, f"{name}(0)", template, "Pod", "", "PENDING")
        for node in (pod, driver):
            self._set(node, "SUCCEEDED")

    def _add(self, parent: str, name: str, template: str, kind: str, step: str, state: str) -> Node:
        """The node with this name, added if it is new; one that failed before starts over."""
        if name not in self.nodes:
            now = self.now()
            self.nodes[name] = Node(name, name.rpartition(").")[2], template, kind, step, now, now)
            if state in {_OMITTED, "SKIPPED"}:
                self.nodes[name].ended = now
        node = self.nodes[name]
        if parent in self.nodes and name not in self.nodes[parent].children:
            self.nodes[parent].children.append(name)
        if not node.history or node.state == "FAILED":
            self._set(node, state)
        return node

    def _set(self, node: Node, state: str) -> None:
        if node.history and node.state == state:
            return
        node.history.append({"update_time": self.now(), **({"state": state} if state else {})})
        if state in {"SUCCEEDED", "FAILED"}:
            node.ended = self.now()
        elif state in {"RUNNING", "PENDING"}:
            node.ended = _NO_TIME


def _in_order(tasks: Record, names: list[str]) -> list[str]:
    """Names of tasks, each after those that it depends on."""
    ordered: list[str] = []
    while rest := [name for name in names if name not in ordered]:
        ordered += [name for name in rest if not set(rest) & set(tasks[name].get("dependentTasks", []))]
    return ordered


def _runs_always(task: Record) -> bool:
    return bool(task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED")


def _template(spec: Record, pipeline: Record, task: Record, kind: str) -> str:
    """Argo's template of a step, whose name tells what the step has: labels on its pod, and repetitions."""
    label = pipeline["components"][task["componentRef"]["name"]].get("executorLabel", "")
    kubernetes = spec.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {})
    metadata = kubernetes.get("deploymentSpec", {}).get("executors", {}).get(label, {}).get("podMetadata", {})
    counts = f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-" if metadata else ""
    return f"{counts}{'retry-' if 'retryPolicy' in task else ''}system-container-{kind}"


def _hash(name: str) -> int:
    """FNV-1a with 32 bits, which Argo takes for a node's id."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _task_id(run_id: str, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{run_id}/{name}"))
