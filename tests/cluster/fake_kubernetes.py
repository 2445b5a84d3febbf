"""A Kubernetes API server for tests: TrainJobs, pods and their logs over real HTTP, with state.

It behaves like a real server in these points: a create with `fieldValidation=Strict` refuses unknown fields (400), here
by the models that Kubeflow Trainer publishes; a name that exists already is answered with 409; an object deleted in the
foreground stays visible with its deletion time until everything that it owns is deleted; a followed log comes in chunks
while the container runs.

Labels of pods, conditions and restarts are as in recordings/objects/trainjob-*.json, and a webhook refuses with 403
(fact 18 of the recordings' README). Not recorded: the points above, events, server-side apply, and port-forwards, which
follow Kubernetes' documentation and kubectl.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from tests.cluster.port_forward import forward

Record = dict[str, Any]
NAMESPACE = "team"
_TRUE = {"1", "t", "T", "true", "TRUE", "True"}  # Go's strconv.ParseBool


@dataclass
class PodLog:
    """The lines that a container has written so far."""

    lines: list[str] = field(default_factory=list)
    has_ended: bool = False
    cut_after: int | None = None  # the connection breaks once, after this number of lines
    changed: threading.Condition = field(default_factory=threading.Condition)

    def write(self, *lines: str) -> None:
        with self.changed:
            self.lines += lines
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.has_ended = True
            self.changed.notify_all()


@dataclass
class FakeKubernetes:
    """The server's state, which a test may change directly.

    Attributes:
        versions: Versions of Trainer's API that the cluster serves.
        unsupported: Beginnings of the paths of fields that this release of Trainer does not have.
        jobs: TrainJobs by name.
        pods: Pods by name.
        logs: Logs by the pod's name.
        requests: Every request, as "METHOD path".
        created: Every TrainJob that was created, as it was sent.
        deleted: The propagation policy of every deletion.
        faults: Patterns of "METHOD path" with the error that is answered once to a matching request, in order; with a
            message of the test's own if it has one.
        is_slow: Whether the pods of a deleted TrainJob stay until a test removes them.
        refusals: Messages of the events that say why a Job's pods are not created.
        warnings: Messages of the events that warn about the newest pod.
        jobsets: JobSets by name.
        events: Changes of the cluster; the next one happens each time a client gets the TrainJob.
        on_create: What the controller does with a new TrainJob.
        objects: Other objects by path, such as `/api/v1/namespaces/team/secrets/keys`; a number is answered as this
            HTTP status. Server-side apply (PATCH) writes here too.
        ports: The server that a pod's port belongs to, for port-forwards.
    """

    versions: list[str] = field(default_factory=lambda: ["v1alpha1"])
    unsupported: tuple[str, ...] = ()
    jobs: dict[str, Record] = field(default_factory=dict)
    pods: dict[str, Record] = field(default_factory=dict)
    logs: dict[str, PodLog] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    created: list[Record] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    faults: list[tuple[str, int] | tuple[str, int, str]] = field(default_factory=list)
    is_slow: bool = False
    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    jobsets: dict[str, Record] = field(default_factory=dict)
    events: Iterator[object] = field(default_factory=lambda: iter(()))
    on_create: Callable[[Record], None] = lambda job: None
    objects: dict[str, Any] = field(default_factory=dict)
    ports: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    @property
    def job(self) -> Record:
        (job,) = self.jobs.values()
        return job

    def add_pod(self, index: int, image: str = "", **more: Any) -> Record:
        """Create a pod of the only TrainJob."""
        name = f"{self.job['metadata']['name']}-node-0-{index}-{len(self.pods):05}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": self.job["metadata"]["name"],
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        created = f"2026-01-01T00:00:{len(self.pods):02}Z"
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "uid": name, "labels": labels, "creationTimestamp": created},
            "spec": {"containers": [{"name": "node", "image": image}]},
            "status": {"phase": "Pending"},
        }
        self.pods[name], self.logs[name] = pod, PodLog()
        return pod

    def add_service(self, namespace: str, name: str, port: int, server: tuple[str, int]) -> None:
        """Create a Service with one pod, whose port is a server of this machine."""
        space, pod = f"/api/v1/namespaces/{namespace}", f"{name}-0"
        container = {"name": "main", "ports": [{"name": "main", "containerPort": 8333}]}
        pods = self.objects.setdefault(f"{space}/pods", {"kind": "PodList", "items": []})
        pods["items"] = [
            {
                "metadata": {"name": pod, "namespace": namespace},
                "spec": {"containers": [container]},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            }
        ]
        self.objects[f"{space}/services/{name}"] = {
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": {"app": name}, "ports": [{"port": port, "targetPort": "main"}]},
        }
        self.ports[pod, 8333] = server

    def run(self, pod: Record, *lines: str) -> None:
        """Start a pod's container, which writes lines."""
        _set_state(pod, "Running", {"running": {}})
        self.logs[pod["metadata"]["name"]].write(*lines)

    def end(self, pod: Record, code: int = 0, message: str = "") -> None:
        """End a pod's container."""
        state = {"exitCode": code, **({"message": message} if message else {})}
        _set_state(pod, "Failed" if code else "Succeeded", {"terminated": state})
        self.logs[pod["metadata"]["name"]].end()

    def conclude(self, kind: str, message: str = "", reason: str = "ByTest") -> None:
        """Add a condition to the TrainJob."""
        conditions = self.job.setdefault("status", {}).setdefault("conditions", [])
        conditions.append(
            {
                **{"type": kind, "status": "True", "reason": reason, "message": message},
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        )


def _set_state(pod: Record, phase: str, state: Record) -> None:
    status: Record = {"name": "node", "image": "i", "imageID": "i", "ready": True, "restartCount": 0, "state": state}
    pod["status"] = {"phase": phase, "containerStatuses": [status]}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[FakeKubernetes, Path]]:
    """Start a server, and write a kubeconfig with its address."""
    state = FakeKubernetes()
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "current-context": "x",
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        yield state, path
        for log in state.logs.values():
            log.end()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    state: FakeKubernetes
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    def do_PATCH(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = yaml.safe_load(self.rfile.read(length)) if length else None
        request = f"{self.command} {url.path}"
        self.state.requests.append(request)
        for fault in self.state.faults:
            if re.search(fault[0], request):
                self.state.faults.remove(fault)
                return self._refuse(fault[1], fault[2] if len(fault) > 2 else "by the test")
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return answer(self, query, body, *match.groups())
        if self.command == "PATCH" and self.headers["Content-Type"] == "application/apply-patch+yaml":
            self.state.objects[url.path] = body
        found = self.state.objects.get(url.path, 404)
        if isinstance(found, int):
            return self._refuse(found, f"no such path: {request}")
        return self._answer(found)

    def _port_forward(self, query: Mapping[str, str], body: Any, pod: str) -> None:
        port = int(query["ports"])
        if (pod, port) not in self.state.ports:
            return self._refuse(404, f'pods "{pod}" not found')
        return forward(self, port, self.state.ports[pod, port])

    def _groups(self, query: Mapping[str, str], body: Any) -> None:
        versions = [{"groupVersion": f"trainer.kubeflow.org/{name}", "version": name} for name in self.state.versions]
        groups = [{"name": "trainer.kubeflow.org", "versions": versions}] if versions else []
        self._answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})

    def _create(self, query: Mapping[str, str], job: Record) -> None:
        name = job["metadata"]["name"]
        if query.get("fieldValidation") == "Strict" and (unknown := unknown_fields(job, self.state.unsupported)):
            return self._refuse(400, f"strict decoding error: unknown field {unknown}")
        if name in self.state.jobs:
            return self._refuse(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.state.jobs[name] = job
        self.state.created.append(json.loads(json.dumps(job)))
        self.state.on_create(job)
        return self._answer(job, 201)

    def _job(self, query: Mapping[str, str], body: Any, name: str) -> None:
        next(self.state.events, None)
        job = self.state.jobs.get(name)
        if job is None:
            return self._refuse(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        return self._answer(job)

    def _delete(self, query: Mapping[str, str], body: Any, name: str) -> None:
        if name not in self.state.jobs:
            return self._refuse(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        self.state.deleted.append(query.get("propagationPolicy", ""))
        if not self.state.is_slow:
            self.state.pods = {key: pod for key, pod in self.state.pods.items() if not key.startswith(name)}
            self.state.jobsets.pop(name, None)
        return self._answer(self.state.jobs.pop(name))

    def _pods(self, query: Mapping[str, str], body: Any) -> None:
        wanted = dict(part.split("=") for part in query["labelSelector"].split(","))
        found = [pod for pod in self.state.pods.values() if wanted.items() <= pod["metadata"]["labels"].items()]
        self._answer({"kind": "PodList", "apiVersion": "v1", "items": found})

    def _pod(self, query: Mapping[str, str], body: Any, name: str) -> None:
        if name not in self.state.pods:
            return self._refuse(404, f'pods "{name}" not found')
        return self._answer(self.state.pods[name])

    def _events(self, query: Mapping[str, str], body: Any) -> None:
        wanted = dict(part.split("=") for part in query["fieldSelector"].split(","))
        if wanted == {"involvedObject.kind": "Job", "reason": "FailedCreate"}:
            about, messages = f"{self.state.job['metadata']['name']}-node-0", self.state.refusals
        else:
            assert wanted == {"involvedObject.kind": "Pod", "type": "Warning"}
            about, messages = list(self.state.pods)[-1], self.state.warnings
        events = [
            {
                "metadata": {"name": f"event-{number}"},
                "involvedObject": {"kind": wanted["involvedObject.kind"], "name": about},
                "reason": "FailedCreate",
                "message": message,
            }
            for number, message in enumerate(messages)
        ]
        self._answer({"kind": "EventList", "apiVersion": "v1", "items": events})

    def _jobset(self, query: Mapping[str, str], body: Any, name: str) -> None:
        if name not in self.state.jobsets:
            return self._refuse(404, f'jobsets.jobset.x-k8s.io "{name}" not found')
        return self._answer(self.state.jobsets[name])

    def _log(self, query: Mapping[str, str], body: Any, name: str) -> None:
        log = self.state.logs[name]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        while True:
            with log.changed:
                while query.get("follow") in _TRUE and len(log.lines) == sent and not log.has_ended:
                    log.changed.wait()
                if len(log.lines) == sent:
                    break
                line = log.lines[sent]
            stamp = f"2026-01-01T00:00:{sent:02}.000000000Z " if query.get("timestamps") in _TRUE else ""
            self._chunk(f"{stamp}{line}\n".encode())
            sent += 1
            if sent == log.cut_after:
                log.cut_after = None
                self.close_connection = True
                return
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _refuse(self, status: int, message: str) -> None:
        self._answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message}, status)

    def _answer(self, document: Record, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


_JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_ROUTES: dict[str, Callable[..., None]] = {
    r"GET /api/v1/namespaces/[^/]+/pods/([^/]+)/portforward": _Handler._port_forward,
    "GET /apis/": _Handler._groups,
    f"POST {_JOBS}": _Handler._create,
    f"GET {_JOBS}/([^/]+)": _Handler._job,
    f"DELETE {_JOBS}/([^/]+)": _Handler._delete,
    f"GET {_PODS}": _Handler._pods,
    f"GET /api/v1/namespaces/{NAMESPACE}/events": _Handler._events,
    f"GET /apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets/([^/]+)": _Handler._jobset,
    f"GET {_PODS}/([^/]+)": _Handler._pod,
    f"GET {_PODS}/([^/]+)/log": _Handler._log,
}


def unknown_fields(job: Record, unsupported: tuple[str, ...] = ()) -> Sequence[str]:
    """The paths of a TrainJob's fields that Trainer's own models drop, and of those that are declared unsupported."""
    model = TrainerV1alpha1TrainJob.from_dict(job)
    assert model is not None
    paths = _paths(job)
    return sorted(
        paths - _paths(model.to_dict()) | {path for path in paths if unsupported and path.startswith(unsupported)}
    )


def _paths(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {found for key, item in value.items() for found in _paths(item, f"{path}.{key}")}
    if isinstance(value, list):
        return {found for number, item in enumerate(value) for found in _paths(item, f"{path}[{number}]")}
    return {f"{path}={value}"}
