"""A run's pods and Workflow in Kubernetes, where the caller may read them: Kubeflow's API does not show either.

Kubeflow labels everything that belongs to a run with the run's id, and Argo writes into each pod which node of the
Workflow it is, so the pod of a step's attempt is found without knowing its name.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kubernetes
import urllib3

from minicpmv_finetune.kubernetes_terms import RUN_LABEL

from .kubernetes_access import kubernetes_client
from .profile import Profile
from .run_steps import step_of_path

_NODE_NAME = "workflows.argoproj.io/node-name"
_NODE_ID = "workflows.argoproj.io/node-id"
_TIMEOUT_SECONDS = (5, 30)
_IDS_AT_ONCE = 100

Record = dict[str, Any]


class NoAccessError(Exception):
    """Kubernetes cannot be asked from here; the message is the reason."""


@dataclass(frozen=True)
class Pod:
    """One pod of a run.

    Attributes:
        name: Its name.
        node: Id of its node in the Workflow.
        step: The step that it belongs to, as `StepRow.step` has it; the pod's name if it belongs to none.
        record: The object as Kubernetes returns it.
    """

    name: str
    node: str
    step: str
    record: Record


class Namespace:
    """Reads what Kubernetes knows of runs in one namespace.

    Every method raises NoAccessError if Kubernetes cannot be asked, and if it does not answer.
    """

    def __init__(self, profile: Profile) -> None:
        self.name = profile.namespace
        client = kubernetes_client()
        if client is None:
            raise NoAccessError("there is no kubeconfig here")
        self._client = client

    def pods(self, run_id: str) -> list[Pod]:
        """The pods of a run, oldest first."""
        items = self._items(f"/api/v1/namespaces/{self.name}/pods", labelSelector=f"{RUN_LABEL}={run_id}")
        items.sort(key=lambda item: str(item["metadata"].get("creationTimestamp", "")))
        return [_pod(item) for item in items]

    def workflows(self, run_ids: Sequence[str]) -> dict[str, Record]:
        """The Workflows of runs by the run's id; a stock Kubeflow deletes them an hour after their end."""
        path = f"/apis/argoproj.io/v1alpha1/namespaces/{self.name}/workflows"
        # A selector is part of an address, whose length is limited.
        groups = [run_ids[start : start + _IDS_AT_ONCE] for start in range(0, len(run_ids), _IDS_AT_ONCE)]
        items = [
            item for ids in groups for item in self._items(path, labelSelector=f"{RUN_LABEL} in ({','.join(ids)})")
        ]
        return {str(item["metadata"].get("labels", {}).get(RUN_LABEL)): item for item in items}

    def train_job(self, run_id: str) -> Record:
        """The TrainJob of a run that trains on several nodes; empty if there is none."""
        path = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{self.name}/trainjobs"
        return next(iter(self._items(path, labelSelector=f"{RUN_LABEL}={run_id}")), {})

    def warnings(self, pod: str) -> list[str]:
        """What Kubernetes warns about a pod, newest last, such as a volume that cannot be mounted."""
        selector = f"involvedObject.name={pod},type=Warning"
        items = self._items(f"/api/v1/namespaces/{self.name}/events", fieldSelector=selector)
        items.sort(key=lambda item: str(item.get("lastTimestamp") or item.get("eventTime") or ""))
        return [f"{item.get('reason')}: {item.get('message')}" for item in items]

    def log(self, pod: str) -> str:
        """What a step's container has written so far; empty if the pod is gone or the container has not started."""
        content = self._read(f"/api/v1/namespaces/{self.name}/pods/{pod}/log", container="main")
        return content.decode(errors="replace") if content else ""

    def _items(self, path: str, **query: str) -> list[Record]:
        content = self._read(path, **query)
        return list(json.loads(content).get("items") or []) if content else []

    def _read(self, path: str, **query: str) -> bytes:
        """The answer's body; empty if there is nothing at this path (404), or not yet (400)."""
        try:
            answer = self._client.call_api(
                path,
                "GET",
                query_params=list(query.items()),
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT_SECONDS,
            )
        except kubernetes.client.ApiException as error:
            if error.status in (400, 404):
                return b""
            raise NoAccessError(f"Kubernetes refuses to show {path.rpartition('/')[2]} ({error.status})") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise NoAccessError(f"Kubernetes does not answer ({type(error).__name__})") from error
        return bytes(answer.data)


def _pod(record: Record) -> Pod:
    metadata = record["metadata"]
    annotations = metadata.get("annotations") or {}
    step = step_of_path(str(annotations.get(_NODE_NAME) or metadata["name"]))
    return Pod(str(metadata["name"]), str(annotations.get(_NODE_ID, "")), step, record)
