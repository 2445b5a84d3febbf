"""The Kubernetes API as the train step uses it: this pod, TrainJobs, their pods and logs.

Every failure is one of the project's two kinds of error.
"""

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError

if TYPE_CHECKING:
    from kubernetes.client import V1Pod

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CONTAINER = "node"  # Trainer's name for the container, and the replicated job, that trains
SETUP = "k8s/README.md (Several nodes)"  # where a person finds how to prepare a namespace
CALL_TIMEOUT = (5, 30)  # seconds to connect, and between two parts of an answer
_LOG_TIMEOUT = (5, 600)  # a log may be silent for a long time
_JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_ROLE_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_JOBSETS = ("jobset.x-k8s.io", "v1alpha2")
_REQUEST: dict[str, Any] = {"_request_timeout": CALL_TIMEOUT}

Answer = TypeVar("Answer")


class UnknownFieldError(UserError):
    """This release of Kubeflow Trainer does not know a field of the object."""


class Cluster:
    """Access to this pod's namespace."""

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
                f"num_nodes: this process has no access to Kubernetes ({error}); run the pipeline on a cluster, with a "
                "service account whose token is mounted, or leave num_nodes out."
            ) from error
        self._client = client.ApiClient(settings)
        self._core = client.CoreV1Api(self._client)
        self._custom = client.CustomObjectsApi(self._client)
        self._groups = client.ApisApi(self._client)

    def own_pod(self) -> dict[str, Any]:
        """The pod that this process runs in, as a Kubernetes object."""
        name = environment.POD_NAME.read() or socket.gethostname()
        pod = self._call("get pods", lambda: self._core.read_namespaced_pod(name, self.namespace, **_REQUEST))
        if pod is None:
            raise UserError(f"num_nodes: there is no pod {name} in {self.namespace}; run the pipeline on a cluster.")
        manifest: dict[str, Any] = self._client.sanitize_for_serialization(pod)
        return manifest

    def require_trainer(self) -> None:
        """Fail unless the cluster serves TrainJobs in the version that is created here."""
        listed = self._call("list API groups", lambda: self._groups.get_api_versions(**_REQUEST))
        served = [version.version for group in listed.groups if group.name == GROUP for version in group.versions or []]
        if VERSION not in served:
            found = f"serves {GROUP} as {', '.join(served)}" if served else f"does not serve {GROUP}"
            raise UserError(f"num_nodes: the cluster {found}; install Kubeflow Trainer 2.2 or newer with {VERSION}.")

    def create(self, job: Mapping[str, Any]) -> bool:
        """Create a TrainJob; False if one with its name exists already."""
        created: bool = self._call(
            "create trainjobs",
            lambda: (
                self._custom.create_namespaced_custom_object(
                    # Without this, unknown fields would be dropped without a warning.
                    *(GROUP, VERSION, self.namespace, PLURAL, job),
                    field_validation="Strict",
                    **_REQUEST,
                )
                is not None
            ),
            conflict=False,
        )
        return created

    def find(self, name: str) -> dict[str, Any] | None:
        """Get a TrainJob by its name; None if there is none."""
        job: dict[str, Any] | None = self._call(
            "get trainjobs",
            lambda: self._custom.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, **_REQUEST),
        )
        return job

    def delete(self, name: str) -> None:
        """Delete a TrainJob; what belongs to it is deleted after it, see `has_remains`.

        Not the other way round (foreground): Trainer starts the nodes again when a TrainJob, though it is being
        deleted, has lost them.
        """
        self._call(
            "delete trainjobs",
            lambda: self._custom.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, propagation_policy="Background", **_REQUEST
            ),
        )

    def has_remains(self, name: str) -> bool:
        """Whether pods or the JobSet of a deleted TrainJob are there, which a new one of this name would take over."""
        if self.pods(name):
            return True
        with suppress(UserError):  # the right to get JobSets is optional
            return self._jobset(name) is not None
        return False

    def pods(self, name: str) -> list["V1Pod"]:
        """List the pods of a TrainJob that train."""
        selector = f"{_JOB_LABEL}={name},{_ROLE_LABEL}={CONTAINER}"
        listed = self._call(
            "list pods",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=selector, **_REQUEST),
        )
        return list(listed.items)

    def warnings(self, name: str, pods: Sequence["V1Pod"], since: str | None) -> list[str]:
        """What Kubernetes warns about last: why it creates no pods of a TrainJob, or why one is not started.

        Args:
            name: Name of the TrainJob.
            pods: Its pods that wait; without any, its Job is asked about.
            since: When it was created; events of an earlier one of this name are older.

        Returns:
            The newest message; nothing if there is none, or if it may not be asked.
        """
        begin = datetime.fromisoformat(since) if since else datetime.min.replace(tzinfo=UTC)
        names = {pod.metadata.name for pod in pods}
        kind = "involvedObject.kind=Pod,type=Warning" if pods else "involvedObject.kind=Job,reason=FailedCreate"
        with suppress(UserError, RetryableError):
            listed = self._call(
                "list events",
                lambda: self._core.list_namespaced_event(self.namespace, field_selector=kind, **_REQUEST),
            )
            dated = [
                (event.last_timestamp or begin, _POD_OF_THE_MESSAGE.sub("", str(event.message)))
                for event in (listed.items if listed else [])
                if (event.involved_object.name in names if pods else event.involved_object.name.startswith(f"{name}-"))
            ]
            return [message for when, message in sorted(dated, key=lambda item: item[0]) if when >= begin][-1:]
        return []

    def most_restarts(self, name: str) -> int | None:
        """How often JobSet starts all nodes again; None if it may not be asked."""
        with suppress(UserError, RetryableError):
            found = self._jobset(name) or {}
            return int(found.get("spec", {}).get("failurePolicy", {}).get("maxRestarts", 0)) or None
        return None

    def _jobset(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._call(
            "get jobsets",
            lambda: self._custom.get_namespaced_custom_object(*_JOBSETS, self.namespace, "jobsets", name, **_REQUEST),
        )
        return found

    def log(self, pod: str, follow: bool) -> Iterator[str]:
        """Read a pod's log.

        Args:
            pod: Name of the pod.
            follow: Whether to wait for further lines until the container ends.

        Yields:
            Each line after its timestamp. A log that cannot be read further ends; that is no error.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            stream = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=CONTAINER,
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

    def _call(self, action: str, send: Callable[[], Answer], conflict: Any = None) -> Any:
        """Call Kubernetes.

        Args:
            action: What the request does, as verb and resource.
            send: Sends the request.
            conflict: The value to return if the object exists already.

        Returns:
            The answer; None if there is no such object.

        Raises:
            UserError: Kubernetes refuses the request.
            RetryableError: Kubernetes does not answer, or has an internal error.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return send()
        except ApiException as error:
            if error.status == 404 and not action.startswith("create"):
                return None
            if error.status == 409:
                return conflict
            reason = _reason(error)
            if explained := _explain_refusal(action, self.namespace, reason):
                raise explained from error
            if error.status in (401, 403):
                raise UserError(
                    f"Kubernetes: this pod's service account may not {action} in {self.namespace} ({reason}); grant it "
                    f"this right, see {SETUP}."
                ) from error
            if error.status == 400 and "unknown field" in reason:
                raise UnknownFieldError(f"Kubernetes refuses to {action}: {reason}; fix it and run again.") from error
            if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
                raise UserError(f"Kubernetes refuses to {action}: {reason}; fix it and run again.") from error
            if hook := _FAILED_WEBHOOK.search(reason):
                raise RetryableError(
                    f"Kubernetes: the webhook {hook[1]}, which checks every TrainJob, does not answer ({reason}); see "
                    "whether Kubeflow Trainer's controller runs, and try again."
                ) from error
            raise RetryableError(f"Kubernetes answered {error.status} to {action}; try again.") from error
        except (HTTPError, OSError) as error:
            raise RetryableError(f"Kubernetes does not answer ({type(error).__name__}); try again.") from error


# A name that is a new one at each attempt to create the pod.
_POD_OF_THE_MESSAGE = re.compile(r'^Error creating: pods "[^"]*" is forbidden: ')
_FAILED_WEBHOOK = re.compile(r'failed calling webhook "([^"]*)"')
_WEBHOOK = re.compile(r'admission webhook "([^"]*)" denied the request')
_MISSING_RUNTIME = re.compile(r'TrainingRuntime\S* "?([^"\s]+)"? not found|must be created before the TrainJob')
_QUOTA = re.compile(r"exceeded quota: ([^,\s]+)")


def _explain_refusal(action: str, namespace: str, reason: str) -> UserError | None:
    """What Kubernetes refuses for another reason than a missing right, with the same status 403."""
    if _MISSING_RUNTIME.search(reason):
        return UserError(
            f"Kubernetes: {namespace} has no TrainingRuntime {environment.TRAINING_RUNTIME.read()} ({reason}); apply "
            f"it, see {SETUP}, or name another one in {environment.TRAINING_RUNTIME}."
        )
    if quota := _QUOTA.search(reason):
        return UserError(
            f"Kubernetes: the quota {quota[1]} of {namespace} is too small for this TrainJob ({reason}); ask for more, "
            "or use fewer nodes."
        )
    if "violates PodSecurity" in reason:
        return UserError(
            f"Kubernetes: the Pod Security of {namespace} refuses this TrainJob ({reason}); take what it names out of "
            "the TrainingRuntime."
        )
    if hook := _WEBHOOK.search(reason):
        return UserError(f"Kubernetes: the webhook {hook[1]} refuses to {action} ({reason}); do what it asks.")
    if "denied request" in reason:
        return UserError(f"Kubernetes: a policy of the cluster refuses to {action} ({reason}); do what it asks.")
    return None


def _reason(error: Any) -> str:
    """The message of Kubernetes' answer, which is a Status object."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")[:1000]
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
