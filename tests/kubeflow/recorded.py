"""What a real Kubeflow Pipelines 2.17 on Kubernetes 1.36 answered, without what the tests do not need.

Runs are beside the recordings to which the fake server is held; here are logs, pods and a Workflow.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfp_server_api

FOLDER = Path(__file__).parent / "recordings"
_RUNS = Path(__file__).parents[1] / "cluster" / "recordings" / "objects"


def read(name: str) -> Any:
    """A recorded answer."""
    path = FOLDER / f"{name}.json"
    return json.loads((path if path.exists() else _RUNS / path.name).read_text())


def read_run(name: str, **change: Any) -> kfp_server_api.V2beta1Run:
    """A recorded run, as the client returns it."""
    text = json.dumps({**read(f"run-{name}"), **change})
    return kfp_server_api.ApiClient().deserialize(SimpleNamespace(data=text), "V2beta1Run")


def read_pods() -> dict[str, Any]:
    """Recorded pods by the step that they belong to."""
    node_name = "workflows.argoproj.io/node-name"
    return {item["metadata"]["annotations"][node_name].split(".")[2][:-3]: item for item in read("pods")["items"]}
