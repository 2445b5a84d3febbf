"""Words of Kubernetes that both the training step and the command line understand: labels, Services, reasons to wait.

The values are those of Kubernetes 1.36, Kubeflow Pipelines 2.17 and Kueue.
"""

import re
from urllib.parse import urlsplit

RUN_LABEL = "pipeline/runid"
"""With the run's id, on everything that belongs to a run of Kubeflow Pipelines."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_SERVICE = re.compile(r"(?P<name>[a-z0-9-]+)\.(?P<namespace>[a-z0-9-]+)(\.svc(\.[a-z0-9.-]+)?)?")
_STARTING = ("ContainerCreating", "PodInitializing", "")
_UNPULLABLE = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "ImageInspectError": "its image cannot be read",
    "InvalidImageName": "its image has no valid name",
    "ErrImageNeverPull": "its image is not on the node",
}
_OTHERS = {
    "CreateContainerConfigError": "its container cannot be created",
    "CreateContainerError": "its container cannot be created",
}


def service_of(address: str) -> tuple[str, str] | None:
    """Name and namespace of the Service that an address may name; None if it has another form, or begins with https."""
    parts = urlsplit(address)
    match = _SERVICE.fullmatch(parts.hostname or "") if parts.scheme == "http" else None
    return (match["name"], match["namespace"]) if match else None


def cannot_be_pulled(reason: str) -> bool:
    """Whether the reason of a waiting container is its image."""
    return reason in _UNPULLABLE


def why_container_waits(reason: str) -> str:
    """Why a container waits until somebody acts, in a few words, by Kubernetes' reason.

    Returns:
        The words; empty if the container is being started as usual.
    """
    if reason in _STARTING:
        return ""
    return (_UNPULLABLE | _OTHERS).get(reason, "its container cannot be started")
