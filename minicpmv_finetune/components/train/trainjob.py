"""Train on several nodes: a Kubeflow Trainer `TrainJob` from this pod's own image, followed to its end.

The pod of the train step asks Kubernetes for the TrainJob, shows the first node's log as its own, and fetches the
result. What the nodes need travels through object storage. The TrainJob's name follows from the pipeline run and the
task, so a retried pod finds the one that its predecessor created; SIGTERM deletes it.

The object holds only fields that Trainer's releases spell alike, and the server is told to refuse what it does not
know; everything else (GPUs, volumes, tolerations) is the TrainingRuntime's, which the cluster's owner writes. The
`kubeflow` package's own client is not used, since it takes environment variables by value only, and a credential must
stay in its Secret.
"""

import hashlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RETRY_EXIT, USER_ERROR_EXIT, RetryableError, UserError
from minicpmv_finetune.reports.training_record import read_record

if TYPE_CHECKING:
    from kubernetes.client import V1ContainerStatus, V1Pod

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
DEFAULT_RUNTIME = "minicpmv-finetune"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PIPELINE_RUN_LABEL = "pipeline/runid"  # as Kubeflow Pipelines labels the pods of a run
_COMMAND = ["python", "-m", "minicpmv_finetune.components.train.trainjob_pod"]
_CONTAINER = "node"  # Trainer's name for the container, and the replicated job, that trains
_JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_ROLE_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_FORWARDED = ("AWS_", "MLFLOW_", environment.PIPELINE_RUN_ID.name)
_CREDENTIAL = re.compile("KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL|USERNAME|AUTHORIZATION")
_URL_WITH_LOGIN = re.compile(r"://[^/\s]*@")
_PATIENCE = 600  # seconds that Kubernetes may be out of reach, as while it is upgraded
_CALL_TIMEOUT = (5, 30)  # seconds to connect and between two pieces of an answer
_LOG_TIMEOUT = (5, 600)  # a log may be silent for long

Answer = TypeVar("Answer")


class _CancelledError(BaseException):
    """SIGTERM has come."""


def train_on_nodes(flags: Sequence[str], nodes: int, output_uri: str, out: Path, interval: float = 5.0) -> None:
    """Train on several nodes of a cluster, from within a pod of its Kubeflow Pipelines.

    Args:
        flags: of the training script, without an output folder; every place they name must mean the same on the nodes.
        nodes: number of pods; each has a process for each of its GPUs.
        output_uri: `s3://` folder of the task's result, of no other task; the nodes write there.
        out: receives the result.
        interval: seconds between two looks at the TrainJob.

    Raises:
        UserError: a node found a mistake only the user can mend, or the cluster lacks something.
        RetryableError: a node, Kubernetes or the store met a fault that may be gone next time, or SIGTERM came.
        SystemExit: a node failed otherwise (its exit code); its traceback is in the log.
    """
    if not storage.is_object_uri(output_uri):
        raise UserError(
            f"num_nodes {nodes}: the nodes hand their result over in object storage, but this run keeps its artifacts "
            f"in {output_uri}; run the pipeline on a cluster, or leave num_nodes out."
        )
    cluster = _Cluster()
    name = job_name(environment.PIPELINE_RUN_ID.read(), output_uri)
    job = build_job(name, nodes, output_uri, flags, cluster.own_pod(), os.environ)
    with _sigterm_raises():
        try:
            _start(cluster, name, job, interval)
            try:
                _follow(cluster, name, nodes, interval)
            except UserError:
                # Another try is in vain, whatever the runtime's rules on restarts are.
                with suppress(UserError, RetryableError):
                    cluster.delete(name)
                raise
        except _CancelledError:
            cluster.delete(name)
            raise RetryableError(
                f"Training was told to stop, and TrainJob {name} is deleted; running it again goes on from the newest "
                "checkpoint."
            ) from None
    _fetch(output_uri, out)


def job_name(pipeline_run: str, output_uri: str) -> str:
    """The same for every attempt at a task of a pipeline run, and another for every other task.

    Args:
        pipeline_run: its id.
        output_uri: of the task; a retried pod is given the same, a task in a loop one for each turn.

    Returns:
        Short enough for the names that pods and hosts derive from it (63 characters at most).
    """
    digest = hashlib.sha256(f"{pipeline_run}\n{output_uri}".encode()).hexdigest()
    return f"train-{digest[:16]}"


def build_job(
    name: str, nodes: int, output_uri: str, flags: Sequence[str], pod: Mapping[str, Any], variables: Mapping[str, str]
) -> dict[str, Any]:
    """The TrainJob as Kubernetes takes it.

    Args:
        name: see `job_name`.
        nodes: number of pods.
        output_uri: where the first node puts the result.
        flags: of the training script.
        pod: this pod as Kubernetes shows it; its image and its references to Secrets are handed on.
        variables: environment variables of this process.
    """
    main = _main_container(pod)
    labels = {"app.kubernetes.io/name": "minicpmv-finetune"}
    if run := environment.PIPELINE_RUN_ID.read(variables):
        labels[PIPELINE_RUN_LABEL] = run
    if queue := pod["metadata"].get("labels", {}).get(QUEUE_LABEL):
        labels[QUEUE_LABEL] = queue
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": labels,
            # The workflow that owns this pod: with it, also a finished TrainJob is cleared away.
            "ownerReferences": [
                {field: owner[field] for field in ("apiVersion", "kind", "name", "uid")}
                for owner in pod["metadata"].get("ownerReferences", [])
            ],
        },
        "spec": {
            "runtimeRef": {
                "apiGroup": GROUP,
                "kind": "TrainingRuntime",
                "name": environment.TRAINING_RUNTIME.read(variables),
            },
            "trainer": {
                "image": main["image"],
                "command": _COMMAND,
                "args": [_literal(word) for word in (output_uri, *flags)],
                "env": _forwarded(main.get("env", []), variables),
                "numNodes": nodes,
            },
        },
    }


def _forwarded(entries: Sequence[Mapping[str, Any]], variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """What storage and tracking need: by reference where this pod has it from a Secret, by value if it is none."""
    references = {
        entry["name"]: entry["valueFrom"]
        for entry in entries
        if {"secretKeyRef", "configMapKeyRef"} & set(entry.get("valueFrom", {}))
    }
    forwarded: list[dict[str, Any]] = []
    for name in sorted({*references, *variables}):
        value = variables.get(name, "")
        if not name.startswith(_FORWARDED):
            continue
        if name in references:
            forwarded.append({"name": name, "valueFrom": references[name]})
        elif _CREDENTIAL.search(name) or _URL_WITH_LOGIN.search(value):
            # The TrainingRuntime may have it from a Secret of its own.
            _say(f"{name} is not handed on to the nodes: here it is no reference to a Secret")
        else:
            forwarded.append({"name": name, "value": _literal(value)})
    return forwarded


def _main_container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    containers: Sequence[Mapping[str, Any]] = pod["spec"]["containers"]
    return next((one for one in containers if one["name"] == "main"), containers[0])


def _literal(text: str) -> str:
    """Kubernetes replaces `$(NAME)` in arguments and variables, and takes two dollars for one."""
    return text.replace("$", "$$")


def _start(cluster: "_Cluster", name: str, job: Mapping[str, Any], interval: float) -> None:
    """Create the TrainJob, or find the one of an earlier attempt; one that failed is replaced."""
    cluster.require_trainer()
    while True:
        found = cluster.find(name)
        if found is None:
            if cluster.create(job):
                _say(f"TrainJob {name} is created, {job['spec']['trainer']['numNodes']} nodes")
                return
        elif not _is_being_deleted(found):
            if not _condition(found, "Failed"):
                _say(f"TrainJob {name} of an earlier attempt is found again")
                return
            cluster.delete(name)
        # Its name is free only when its pods are gone.
        time.sleep(interval)


def _follow(cluster: "_Cluster", name: str, nodes: int, interval: float) -> None:
    """Show the first node's log until the TrainJob is complete."""
    log = _Log(cluster)
    answered, said = time.monotonic(), ""
    while True:
        try:
            job, pods = cluster.find(name), cluster.pods(name)
        except RetryableError:
            if time.monotonic() - answered > _PATIENCE:
                raise
            time.sleep(interval)
            continue
        answered = time.monotonic()
        log.follow(pods)
        if job is None or _is_being_deleted(job):
            raise RetryableError(f"TrainJob {name} was deleted by somebody else; running it again creates it anew.")
        if _condition(job, "Complete"):
            log.finish(pods)
            return
        mistakes = [message for code, message in _ends(pods) if code == USER_ERROR_EXIT and message]
        if mistakes:
            log.finish(pods)
            raise UserError(mistakes[0])
        if failed := _condition(job, "Failed"):
            log.finish(pods)
            _fail(name, failed, _ends(pods))
        state = _state(job, pods, nodes)
        if state != said:
            _say(f"TrainJob {name}: {state}")
            said = state
        time.sleep(interval)


def _fail(name: str, condition: Mapping[str, Any], ends: Sequence[tuple[int, str]]) -> NoReturn:
    """End as the nodes ended."""
    why = str(condition.get("message") or condition.get("reason") or "no reason given").rstrip(".")
    if condition.get("reason") == "TrainingRuntimeNotSupported":
        raise UserError(f"TrainJob {name}: {why}; apply a TrainingRuntime for torch.")
    for code, message in ends:
        if code == RETRY_EXIT and message:
            raise RetryableError(message)
    for code, _ in ends:
        # Above are signals: the node was taken away.
        if 0 < code < 128 and code != RETRY_EXIT:
            print(f"error: TrainJob {name}: a node ended with exit code {code} ({why}).", file=sys.stderr)
            raise SystemExit(code)
    raise RetryableError(f"TrainJob {name} failed ({why}); running it again goes on from the newest checkpoint.")


def _ends(pods: Sequence["V1Pod"]) -> list[tuple[int, str]]:
    """How containers ended, also those that were started again: exit code and last words."""
    ends = []
    for status in filter(None, map(_status, pods)):
        for state in (status.state, status.last_state):
            if state is not None and state.terminated is not None:
                ends.append((state.terminated.exit_code, state.terminated.message or ""))
    return ends


def _status(pod: "V1Pod") -> "V1ContainerStatus | None":
    statuses = pod.status.container_statuses or []
    return next((status for status in statuses if status.name == _CONTAINER), None)


def _state(job: Mapping[str, Any], pods: Sequence["V1Pod"], nodes: int) -> str:
    """For a person who waits."""
    if suspended := _condition(job, "Suspended"):
        return f"suspended ({suspended.get('message') or suspended.get('reason')})"
    return f"{sum(pod.status.phase == 'Running' for pod in pods)} of {nodes} nodes run"


def _condition(job: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """A condition of the TrainJob that holds."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), None)


def _is_being_deleted(job: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _fetch(uri: str, out: Path) -> None:
    """Bring the result here, whole or not at all."""
    with storage.staged_folder(out) as folder, tempfile.TemporaryDirectory(dir=out.parent) as download:
        for path in storage.fetch(uri, Path(download)).iterdir():
            path.rename(folder / path.name)
        read_record(folder)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def listen(number: int, frame: object) -> None:
        # A second one must not keep the first from being obeyed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _CancelledError

    before = signal.signal(signal.SIGTERM, listen)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Log:
    """The first node's log, each line shown once: connections break, containers are restarted, pods replaced."""

    def __init__(self, cluster: "_Cluster") -> None:
        self._cluster = cluster
        self._latest = ""  # timestamps of one format: their order is that of the text
        self._reader: threading.Thread | None = None
        self._read: set[tuple[str, int]] = set()

    def follow(self, pods: Sequence["V1Pod"]) -> None:
        """Read on, in the background while the container runs, at once when it has ended."""
        pod = _first(pods)
        status = _status(pod) if pod else None
        if pod is None or status is None or status.state is None or self._is_reading():
            return
        run = (pod.metadata.uid, status.restart_count)
        if status.state.running is not None:
            self._reader = threading.Thread(target=self._copy, args=(pod.metadata.name, True), daemon=True)
            self._reader.start()
        elif status.state.terminated is not None and run not in self._read:
            self._copy(pod.metadata.name, follow=False)
            self._read.add(run)

    def finish(self, pods: Sequence["V1Pod"]) -> None:
        """Show what is left of a log that has ended."""
        pod = _first(pods)
        status = _status(pod) if pod else None
        if status is None or status.state is None or status.state.running is not None:
            return
        if self._reader is not None:
            self._reader.join(timeout=_CALL_TIMEOUT[1])
        self.follow(pods)

    def _is_reading(self) -> bool:
        return self._reader is not None and self._reader.is_alive()

    def _copy(self, pod: str, follow: bool) -> None:
        for line in self._cluster.log(pod, follow):
            stamp, _, text = line.partition(" ")
            if stamp > self._latest:
                self._latest = stamp
                print(text, flush=True)


def _first(pods: Sequence["V1Pod"]) -> "V1Pod | None":
    """The pod of the first node; where it was replaced, the newest."""
    found = [pod for pod in pods if (pod.metadata.labels or {}).get(_INDEX_LABEL) == "0"]
    return max(found, key=lambda pod: pod.metadata.creation_timestamp, default=None)


class _Cluster:
    """The Kubernetes API, with its faults told as the project's two kinds."""

    def __init__(self) -> None:
        from kubernetes import client, config

        settings = client.Configuration()
        try:
            if kubeconfig := environment.KUBECONFIG.read():
                config.load_kube_config(kubeconfig, client_configuration=settings)
                context = config.list_kube_config_contexts(kubeconfig)[1]["context"]
                self.namespace = str(context.get("namespace", "default"))
            else:
                config.load_incluster_config(client_configuration=settings)
                self.namespace = _NAMESPACE_FILE.read_text().strip()
        except (config.ConfigException, OSError) as error:
            raise UserError(
                f"num_nodes: no access to Kubernetes from here ({error}); run the pipeline on a cluster, with a "
                "service account whose token is mounted, or leave num_nodes out."
            ) from error
        self._client = client.ApiClient(settings)
        self._core = client.CoreV1Api(self._client)
        self._custom = client.CustomObjectsApi(self._client)
        self._groups = client.ApisApi(self._client)

    def own_pod(self) -> dict[str, Any]:
        """The pod that this process runs in."""
        name = environment.POD_NAME.read() or socket.gethostname()
        pod = self._ask("get pods", lambda: self._core.read_namespaced_pod(name, self.namespace, **_PATIENTLY))
        if pod is None:
            raise UserError(f"num_nodes: no pod {name} in {self.namespace}; run the pipeline on a cluster.")
        shown: dict[str, Any] = self._client.sanitize_for_serialization(pod)
        return shown

    def require_trainer(self) -> None:
        """See that the cluster knows TrainJobs of the version that is created here."""
        listed = self._ask("list API groups", lambda: self._groups.get_api_versions(**_PATIENTLY))
        served = [version.version for group in listed.groups if group.name == GROUP for version in group.versions or []]
        if VERSION not in served:
            found = f"serves {GROUP} as {', '.join(served)}" if served else f"does not serve {GROUP}"
            raise UserError(f"num_nodes: the cluster {found}; install Kubeflow Trainer 2.2 or newer with {VERSION}.")

    def create(self, job: Mapping[str, Any]) -> bool:
        """Whether the TrainJob was created; False when another of its name was faster."""
        return self._ask(
            "create trainjobs",
            lambda: (
                self._custom.create_namespaced_custom_object(
                    # Unknown fields would else be dropped without a word.
                    *(GROUP, VERSION, self.namespace, PLURAL, job),
                    field_validation="Strict",
                    **_PATIENTLY,
                )
                is not None
            ),
            conflict=False,
        )

    def find(self, name: str) -> dict[str, Any] | None:
        """A TrainJob by name."""
        return self._ask(
            "get trainjobs",
            lambda: self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, **_PATIENTLY
            ),
        )

    def delete(self, name: str) -> None:
        """Delete a TrainJob; it stays visible until its pods are gone."""
        self._ask(
            "delete trainjobs",
            lambda: self._custom.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, propagation_policy="Foreground", **_PATIENTLY
            ),
        )

    def pods(self, name: str) -> list["V1Pod"]:
        """A TrainJob's pods that train."""
        selector = f"{_JOB_LABEL}={name},{_ROLE_LABEL}={_CONTAINER}"
        listed = self._ask(
            "list pods",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=selector, **_PATIENTLY),
        )
        return list(listed.items)

    def log(self, pod: str, follow: bool) -> Iterator[str]:
        """A pod's log, each line after its time; what cannot be read of it is left out, and fails nothing."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            stream = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=_CONTAINER,
                follow=follow,
                timestamps=True,
                _preload_content=False,
                _request_timeout=_LOG_TIMEOUT,
            )
            try:
                for line in stream:
                    yield line.decode(errors="replace").rstrip("\n")
            finally:
                stream.release_conn()
        except (ApiException, HTTPError, OSError):
            return

    def _ask(self, what: str, ask: Callable[[], Answer], conflict: Any = None) -> Any:
        """Ask Kubernetes; None when there is no such object, `conflict` when there is one already."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return ask()
        except ApiException as error:
            if error.status == 404 and not what.startswith("create"):
                return None
            if error.status == 409:
                return conflict
            reason = _message(error)
            if error.status in (401, 403):
                raise UserError(
                    f"Kubernetes: this pod's service account may not {what} in {self.namespace} ({reason}); give it "
                    "the right, see k8s/README.md."
                ) from error
            if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
                raise UserError(f"Kubernetes refuses to {what}: {reason}; mend it and run again.") from error
            raise RetryableError(f"Kubernetes answered {error.status} to {what}; try again.") from error
        except (HTTPError, OSError) as error:
            raise RetryableError(f"Kubernetes does not answer ({type(error).__name__}); try again.") from error


_PATIENTLY: dict[str, Any] = {"_request_timeout": _CALL_TIMEOUT}


def _message(error: Any) -> str:
    """The sentence of Kubernetes' answer, which is a Status object."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")[:1000]
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
