"""Train on several nodes: create a Kubeflow Trainer `TrainJob` with this pod's own image, and follow it to its end.

The pod of the train step creates the TrainJob, prints the first node's log as its own, and fetches the result.
Everything that the nodes need travels through object storage. The TrainJob's name follows from the pipeline run and the
task, so a retried pod finds the TrainJob that its predecessor created; SIGTERM deletes it. If this pod is killed, the
nodes end themselves (trainjob_heartbeat.py), and the step's timeout is the TrainJob's own deadline too.

Of the object's fields only the deadline is unknown to some of Trainer's releases; the server is asked to refuse unknown
fields. Everything else (GPUs, volumes, tolerations) belongs to the TrainingRuntime, which the cluster's owner writes.
The `kubeflow` package's own client is not used: it accepts environment variables only by value, but a credential must
stay in its Secret.
"""

import hashlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import (
    RETRY_EXIT,
    USER_ERROR_EXIT,
    RetryableError,
    SentenceExit,
    StoppedError,
    UserError,
)
from minicpmv_finetune.kubernetes_terms import QUEUE_LABEL, RUN_LABEL
from minicpmv_finetune.outputs import claimed_folder
from minicpmv_finetune.reports.training_record import read_record
from minicpmv_finetune.terminal import print_sentence

from .flags import take_processes
from .trainjob_cluster import CALL_TIMEOUT, GROUP, SETUP, VERSION, Cluster, UnknownFieldError
from .trainjob_heartbeat import ABANDONED, sign_of_life
from .trainjob_pod import CRASH
from .trainjob_waiting import container_status, describe_state, out_of_memory, restarts, waiting_reasons

if TYPE_CHECKING:
    from kubernetes.client import V1Pod

_COMMAND = ["python", "-m", "minicpmv_finetune.components.train.trainjob_pod"]
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_DEADLINE = "activeDeadlineSeconds"  # a field of Kubeflow Trainer 2.3 and newer
# What storage, tracking and the hub need, a proxy, and the places that may be read.
_FORWARDED = re.compile(
    "AWS_|MLFLOW_|HF_(?!HOME)|HUGGING_FACE_HUB_|(https?|no|HTTPS?|NO)_(proxy|PROXY)$|(SSL_CERT_FILE|REQUESTS_CA_BUNDLE)$|"
    f"({environment.PIPELINE_RUN_ID}|{environment.ALLOWED_URIS}|{environment.ALLOWED_URIS.former})$"
)
_CREDENTIAL = re.compile("KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL|USERNAME|AUTHORIZATION")
_URL_WITH_LOGIN = re.compile(r"://[^/\s]*@")
_SAY_AGAIN = 600  # seconds until the words of a state that has not changed are said again, if they are new
_MAX_OUTAGE = 600  # seconds that Kubernetes may be out of reach, for example during an upgrade


class _CancelledError(BaseException):
    """SIGTERM was received."""


def train_on_nodes(flags: Sequence[str], nodes: int, output_uri: str, out: Path, interval: float = 5.0) -> None:
    """Train on several nodes of a cluster, from a pod of its Kubeflow Pipelines.

    Args:
        flags: Flags of the training script, without an output folder. Their URIs must be valid on every node.
        nodes: Number of pods; each has one process per GPU.
        output_uri: `s3://` folder of this task's result alone; the first node writes there.
        out: Folder that receives the result.
        interval: Seconds between two queries of the TrainJob.

    Raises:
        UserError: A node found a mistake that only the user can fix, or the cluster lacks something.
        RetryableError: A node, Kubernetes or the store had a temporary fault, or SIGTERM was received.
        SystemExit: A node failed for another reason (with its exit code); its traceback is in the log.
    """
    if not storage.is_object_uri(output_uri):
        raise UserError(
            f"num_nodes {nodes}: the nodes write their result to object storage, but this run keeps its artifacts in "
            f"{output_uri}; run the pipeline on a cluster, or leave num_nodes out."
        )
    cluster = Cluster()
    name = job_name(environment.PIPELINE_RUN_ID.read(), output_uri)
    job = build_job(name, nodes, output_uri, flags, cluster.own_pod(), os.environ)
    with _sigterm_raises(), sign_of_life(output_uri):
        try:
            _start_and_follow(cluster, name, job, interval)
        except _CancelledError:
            # First of all: Argo leaves about a second.
            cluster.delete(name)
            raise StoppedError(
                f"Training was stopped by SIGTERM, and TrainJob {name} is deleted; running the step again continues "
                "from the newest checkpoint."
            ) from None
    _fetch_result(output_uri, out)


def uses_nodes(nodes: int) -> bool:
    """Whether a training runs on nodes of the cluster: several, or one where this pod has no GPU of its own."""
    return nodes > 1 or bool(environment.TRAIN_ON_NODES.read())


def _start_and_follow(cluster: Cluster, name: str, job: Mapping[str, Any], interval: float) -> None:
    _start(cluster, name, job, interval)
    try:
        _follow(cluster, name, job["spec"]["trainer"]["numNodes"], interval)
    except (UserError, SystemExit):
        # Another attempt cannot succeed, so the TrainJob is deleted before its runtime restarts anything.
        with suppress(UserError, RetryableError):
            cluster.delete(name)
        raise


def job_name(pipeline_run: str, output_uri: str) -> str:
    """Derive the TrainJob's name: equal for every attempt at a task of a pipeline run, different for other tasks.

    Args:
        pipeline_run: Id of the pipeline run.
        output_uri: The task's output; a retried pod has the same one, and each iteration of a loop another one.

    Returns:
        A name short enough for the names of pods and hosts that begin with it (63 characters at most).
    """
    digest = hashlib.sha256(f"{pipeline_run}\n{output_uri}".encode()).hexdigest()
    return f"train-{digest[:16]}"


def build_job(
    name: str, nodes: int, output_uri: str, flags: Sequence[str], pod: Mapping[str, Any], variables: Mapping[str, str]
) -> dict[str, Any]:
    """Build the TrainJob object.

    Args:
        name: Name of the object, see `job_name`.
        nodes: Number of pods.
        output_uri: Where the first node writes the result.
        flags: Flags of the training script.
        pod: This pod as a Kubernetes object; the job gets its image and its references to Secrets.
        variables: Environment variables of this process.
    """
    main = _main_container(pod)
    labels = {"app.kubernetes.io/name": "minicpmv-finetune"}
    if run := environment.PIPELINE_RUN_ID.read(variables):
        labels[RUN_LABEL] = run
    if queue := pod["metadata"].get("labels", {}).get(QUEUE_LABEL):
        labels[QUEUE_LABEL] = queue
    timeout = pod["spec"].get(_DEADLINE)
    own_flags, processes = take_processes(flags)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": labels,
            # The workflow that owns this pod: when it is deleted, a finished TrainJob is deleted too.
            "ownerReferences": [
                {field: owner[field] for field in ("apiVersion", "kind", "name", "uid")}
                for owner in pod["metadata"].get("ownerReferences", [])
            ],
        },
        "spec": {
            # The step's timeout: the last bound where nobody is left who would delete the job.
            **({_DEADLINE: timeout} if timeout else {}),
            "runtimeRef": {
                "apiGroup": GROUP,
                "kind": "TrainingRuntime",
                "name": environment.TRAINING_RUNTIME.read(variables),
            },
            "trainer": {
                "image": main["image"],
                "command": _COMMAND,
                "args": [_escape(argument) for argument in (output_uri, *own_flags)],
                "env": _forwarded_variables(main.get("env", []), variables),
                "numNodes": nodes,
                # Without it: as many as a node has GPUs, and without a GPU as many as Trainer makes of its CPUs.
                **({"numProcPerNode": processes} if processes else {}),
            },
        },
    }


def _forwarded_variables(entries: Sequence[Mapping[str, Any]], variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """The variables that storage and tracking need on the nodes.

    A variable that this pod has from a Secret is forwarded as a reference, another one by its value. A credential that
    this pod has only as a value is not forwarded.
    """
    references = {
        entry["name"]: entry["valueFrom"]
        for entry in entries
        if {"secretKeyRef", "configMapKeyRef"} & set(entry.get("valueFrom", {}))
    }
    forwarded: list[dict[str, Any]] = []
    for name in sorted({*references, *variables}):
        value = variables.get(name, "")
        if not _FORWARDED.match(name):
            continue
        if name in references:
            forwarded.append({"name": name, "valueFrom": references[name]})
        elif _CREDENTIAL.search(name) or _URL_WITH_LOGIN.search(value):
            # The TrainingRuntime may have it from a Secret of its own.
            print_sentence(
                f"{name} is not forwarded to the nodes, because in this pod it is not a reference to a Secret"
            )
        else:
            forwarded.append({"name": name, "value": _escape(value)})
    return forwarded


def _main_container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    containers: Sequence[Mapping[str, Any]] = pod["spec"]["containers"]
    return next((container for container in containers if container["name"] == "main"), containers[0])


def _escape(text: str) -> str:
    """Double each dollar: Kubernetes replaces `$(NAME)` in arguments and variables, and turns `$$` into `$`."""
    return text.replace("$", "$$")


def _start(cluster: Cluster, name: str, job: Mapping[str, Any], interval: float) -> None:
    """Create the TrainJob, or find that of an earlier attempt; one that failed is replaced.

    The name is free only when the nodes of a deleted job have ended: they may still save.
    """
    cluster.require_trainer()
    waits = False
    while True:
        found = cluster.find(name)
        if found is None:
            if cluster.has_remains(name):
                if not waits:
                    print_sentence(
                        f"The nodes of an earlier TrainJob {name} have not ended yet; this attempt waits for them"
                    )
                waits = True
            elif _create(cluster, job):
                print_sentence(f"TrainJob {name} is created, {job['spec']['trainer']['numNodes']} nodes")
                return
        elif not _is_being_deleted(found):
            if not _condition(found, "Failed"):
                print_sentence(f"TrainJob {name} of an earlier attempt exists; this attempt follows it")
                return
            cluster.delete(name)
        time.sleep(interval)


def _create(cluster: Cluster, job: Mapping[str, Any]) -> bool:
    try:
        return cluster.create(job)
    except UnknownFieldError as error:
        if _DEADLINE not in str(error):
            raise
    print_sentence(
        "This release of Kubeflow Trainer knows no activeDeadlineSeconds; a killed step's nodes end after 10 minutes"
    )
    return cluster.create({**job, "spec": {name: value for name, value in job["spec"].items() if name != _DEADLINE}})


def _follow(cluster: Cluster, name: str, nodes: int, interval: float) -> None:
    """Print the first node's log until the TrainJob is complete."""
    log, waits, memory = _NodeLog(cluster), _Waits(cluster, name, nodes), dict[str, str]()
    last_answer = time.monotonic()
    while True:
        try:
            job, pods = cluster.find(name), cluster.pods(name)
        except RetryableError:
            if time.monotonic() - last_answer > _MAX_OUTAGE:
                raise
            time.sleep(interval)
            continue
        last_answer = time.monotonic()
        log.follow(pods)
        if job is None or _is_being_deleted(job):
            raise RetryableError(
                f"TrainJob {name} was deleted by somebody else; running the step again creates a new one."
            )
        if _condition(job, "Complete"):
            log.finish(pods)
            return
        memory |= out_of_memory(pods)
        final = [message for code, message in _exits(pods) if code == USER_ERROR_EXIT and message]
        failed = _condition(job, "Failed")
        if final or failed or len(memory) > nodes:
            log.finish(pods)
            _end(name, final, failed or {}, _exits(pods), memory if len(memory) > nodes else out_of_memory(pods))
        waits.report(job, pods)
        time.sleep(interval)


class _Waits:
    """Says how many nodes run, and why others do not, whenever that changes."""

    def __init__(self, cluster: Cluster, name: str, nodes: int) -> None:
        self._cluster, self._name, self._nodes = cluster, name, nodes
        self._state = self._said = ""
        self._said_at = 0.0
        self._most_restarts: int | None = None

    def report(self, job: Mapping[str, Any], pods: Sequence["V1Pod"]) -> None:
        """Print the state if it is another one than the last time; new words for the same state only now and then.

        Raises:
            UserError: Kubernetes will never create the nodes' pods.
        """
        suspended = _condition(job, "Suspended")
        waiting = [pod for pod in pods if pod.status.phase == "Pending"]
        reasons = waiting_reasons(pods, [])
        if not suspended and not reasons and (waiting or not pods):
            since = job["metadata"].get("creationTimestamp")
            reasons = waiting_reasons(pods, self._cluster.warnings(self._name, waiting, since))
        for reason in reasons:
            if "violates PodSecurity" in reason.message:
                raise UserError(
                    f"TrainJob {self._name}: the namespace's Pod Security refuses the nodes ({reason.message}); take "
                    f"what it names out of the TrainingRuntime, see {SETUP}."
                )
        if self._most_restarts is None and restarts(pods):
            self._most_restarts = self._cluster.most_restarts(self._name)
        state = describe_state(suspended, pods, self._nodes, self._most_restarts, [item.kind for item in reasons])
        now = time.monotonic()
        said = describe_state(suspended, pods, self._nodes, self._most_restarts, [str(item) for item in reasons])
        if state != self._state or (said != self._said and now - self._said_at > _SAY_AGAIN):
            print_sentence(f"TrainJob {self._name}: {said}")
            self._state, self._said, self._said_at = state, said, now


def _end(
    name: str,
    final: Sequence[str],
    failed: Mapping[str, Any],
    exits: Sequence[tuple[int, str]],
    memory: Mapping[str, str],
) -> NoReturn:
    """End as the nodes ended, whose last sentences count more than what Trainer says."""
    for sentence in final:
        if sentence == ABANDONED:
            raise RetryableError(f"TrainJob {name}: {sentence}")
        if crash := CRASH.match(sentence):
            print_sentence(f"error: TrainJob {name}: {sentence}")
            raise SystemExit(int(crash[1]))
    if final:
        raise UserError(final[0])
    if memory:
        limit = sorted(set(memory.values()))[-1]
        raise UserError(
            f"TrainJob {name}: a node ran out of memory (limit {limit}); give the nodes more in the TrainingRuntime, "
            "or lower per_device_train_batch_size or dataloader_num_workers."
        )
    _fail(name, failed, exits)


def _fail(name: str, condition: Mapping[str, Any], exits: Sequence[tuple[int, str]]) -> NoReturn:
    """End as the nodes ended."""
    reason = str(condition.get("message") or condition.get("reason") or "no reason given").rstrip(".")
    if condition.get("reason") == "TrainingRuntimeNotSupported":
        raise UserError(f"TrainJob {name}: {reason}; apply a TrainingRuntime for torch.")
    if condition.get("reason") == "DeadlineExceeded":
        raise UserError(f"TrainJob {name}: {reason}; raise the timeout of train in the profile, or train less.")
    for code, message in exits:
        if code == RETRY_EXIT and message:
            raise RetryableError(message)
    for code, _ in exits:
        # Codes above 128 are signals: the node was taken away.
        if 0 < code < 128 and code != RETRY_EXIT:
            sentence = f"TrainJob {name}: a node ended with exit code {code} ({reason})."
            print_sentence(f"error: {sentence}")
            raise SentenceExit(code, sentence)
    raise RetryableError(
        f"TrainJob {name} failed ({reason}); running the step again continues from the newest checkpoint."
    )


def _exits(pods: Sequence["V1Pod"]) -> list[tuple[int, str]]:
    """Exit code and termination message of each container that ended, including those that were restarted."""
    exits = []
    for status in filter(None, map(container_status, pods)):
        for state in (status.state, status.last_state):
            if state is not None and state.terminated is not None:
                exits.append((state.terminated.exit_code, state.terminated.message or ""))
    return exits


def _condition(job: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The TrainJob's condition of this type, if it is true."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((found for found in conditions if found["type"] == kind and found["status"] == "True"), None)


def _is_being_deleted(job: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _fetch_result(uri: str, out: Path) -> None:
    """Download the result, completely or not at all."""
    with (
        claimed_folder(out, "train", {}) as output,
        output.assembled() as folder,
        tempfile.TemporaryDirectory(dir=out.parent) as download,
    ):
        for path in storage.fetch(uri, Path(download)).iterdir():
            path.rename(folder / path.name)
        read_record(folder)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def cancel(number: int, frame: object) -> None:
        # A second signal must not interrupt the handling of the first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _CancelledError

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _NodeLog:
    """The first node's log; each line is printed once, though connections break, and containers and pods restart."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._latest = ""  # timestamp of the last line; all have one format, so they are ordered as text
        self._reader: threading.Thread | None = None
        self._read: set[tuple[str, int]] = set()

    def follow(self, pods: Sequence["V1Pod"]) -> None:
        """Read on: in the background while the container runs, at once if it has ended."""
        pod = _first_node(pods)
        status = container_status(pod) if pod else None
        if pod is None or status is None or status.state is None or self._is_reading():
            return
        run = (pod.metadata.uid, status.restart_count)
        if status.state.running is not None:
            self._reader = threading.Thread(target=self._print, args=(pod.metadata.name, True), daemon=True)
            self._reader.start()
        elif status.state.terminated is not None and run not in self._read:
            self._print(pod.metadata.name, follow=False)
            self._read.add(run)

    def finish(self, pods: Sequence["V1Pod"]) -> None:
        """Print the rest of a log that has ended."""
        pod = _first_node(pods)
        status = container_status(pod) if pod else None
        if status is None or status.state is None or status.state.running is not None:
            return
        if self._reader is not None:
            self._reader.join(timeout=CALL_TIMEOUT[1])
        self.follow(pods)

    def _is_reading(self) -> bool:
        return self._reader is not None and self._reader.is_alive()

    def _print(self, pod: str, follow: bool) -> None:
        for line in self._cluster.log(pod, follow):
            timestamp, _, text = line.partition(" ")
            if timestamp > self._latest:
                self._latest = timestamp
                print(text, flush=True)


def _first_node(pods: Sequence["V1Pod"]) -> "V1Pod | None":
    """The pod of the first node; the newest one if the pod was replaced."""
    found = [pod for pod in pods if (pod.metadata.labels or {}).get(_INDEX_LABEL) == "0"]
    return max(found, key=lambda pod: pod.metadata.creation_timestamp, default=None)
