"""Kubernetes as the commands reach it: with a kubeconfig from outside, and with the mounted token from within."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes
import urllib3

from minicpmv_finetune import environment
from minicpmv_finetune.errors import AccessError, RetryableError, UserError

from .checks import SkippedError

TIMEOUT_SECONDS = 10
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def is_inside_cluster() -> bool:
    """Whether this process runs in a pod, such as a Kubeflow notebook, where names of Services resolve."""
    return bool(environment.KUBERNETES_HOST.read())


def own_namespace() -> str:
    """The namespace of the pod that this process runs in; empty outside of the cluster."""
    try:
        return _NAMESPACE_FILE.read_text().strip() if is_inside_cluster() else ""
    except OSError:
        return ""


def kubernetes_client() -> kubernetes.client.ApiClient | None:
    """A client for the cluster of the kubeconfig, or of this pod; None where there is neither."""
    settings = kubernetes.client.Configuration()
    settings.retries = False  # a cluster that does not answer is reported at once
    try:
        if is_inside_cluster():
            kubernetes.config.load_incluster_config(client_configuration=settings)
        else:
            kubernetes.config.load_kube_config(environment.KUBECONFIG.read() or None, client_configuration=settings)
    except kubernetes.config.ConfigException:
        return None
    return kubernetes.client.ApiClient(settings)


def call_kubernetes(what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The answer of Kubernetes; None if there is no such object.

    Args:
        what: What the call does, for the messages: `read Secret minio in kubeflow`.
        call: Method of the client.
        arguments: Arguments of the method.
        options: Keyword arguments of the method.

    Raises:
        AccessError: This user may not do this.
        UserError: Kubernetes refuses the request.
        RetryableError: Kubernetes does not answer.
    """
    try:
        return call(*arguments, **options, _request_timeout=TIMEOUT_SECONDS)
    except kubernetes.client.ApiException as error:
        if error.status == 404:
            return None
        if error.status in (401, 403):
            raise AccessError(f"Kubernetes: no permission to {what} ({error.status}); request it.") from error
        if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 429):
            raise UserError(f"Kubernetes refuses to {what} ({message_of(error)}); correct it.") from error
        raise RetryableError(f"Kubernetes answered {error.status} to a request to {what}; try again.") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise RetryableError(
            f"Kubernetes does not answer a request to {what} ({type(error).__name__}); check the kubeconfig, and try "
            "again."
        ) from error


def read_object(read: Callable[..., Any], remedy: str, describe: Callable[[Any], str] = lambda answer: "found") -> str:
    """Read an object for a check, and describe it.

    Raises:
        SkippedError: This user may not read the object.
        UserError: There is no such object.
        RetryableError: Kubernetes does not answer.
    """
    try:
        answer = call_kubernetes("read it", read)
    except AccessError as error:
        raise SkippedError(str(error)) from error
    if answer is None:
        raise UserError(f"not found; {remedy}.")
    return describe(answer)


def message_of(error: kubernetes.client.ApiException) -> str:
    """The message of Kubernetes' answer, which is a Status object."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")[:500]
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
