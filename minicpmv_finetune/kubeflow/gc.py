"""Find what nothing refers to any more: artifacts of runs that are gone, shards and checkpoints that nobody will read.

Below `<root>/<pipeline>/` Kubeflow keeps a folder a run, and preprocess its `shards-cache`. Something is unused when

- its run is no longer on the server, and no registered model of MLflow lies in the run's folder;
- it is the shards of a key that no run's manifest points to;
- it is the checkpoints of a run that succeeded: they are for going on after an interruption.

What was written to lately is left alone whatever else is true: it may belong to a run that has just begun. Where the
server or MLflow cannot be asked, nothing is unused.
"""

import json
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.retraining import RETRAIN
from minicpmv_finetune.shards.format import CACHE_NAME, MANIFEST_FILE
from minicpmv_finetune.tracking.registry import list_versions
from minicpmv_finetune.tracking.step_runs import mlflow_client

from .client import Cluster
from .profile import use_storage
from .runs import OVER

_RUN_FOLDER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Unused:
    """A folder that may go."""

    uri: str
    bytes: int
    written: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    """A folder that may be removed if nothing refers to it."""

    why: str
    files: list[storage.StoredFile] = field(default_factory=list)

    @property
    def written(self) -> datetime:
        """When a file in it was last written."""
        return max(file.written for file in self.files)


def find_unused(cluster: Cluster, root: str, min_age_days: int) -> list[Unused]:
    """Folders below the pipeline root that nothing refers to.

    Args:
        cluster: whose runs count. Every run below `root` must be of this server and namespace.
        root: the pipeline root; empty takes the profile's.
        min_age_days: how long ago a folder must last have been written to.

    Raises:
        UserError: no root is known.
        RetryableError: the server, the store or MLflow does not answer.
    """
    root = root or cluster.profile.pipeline_root
    if not root:
        raise UserError("gc: where artifacts lie is not known; give --root, the pipeline root of kfp-launcher.")
    use_storage(cluster.profile)
    states = {str(run.run_id): str(run.state) for run in cluster.runs()}
    kept = _registered_models(cluster)
    candidates: dict[str, _Candidate] = {}
    for pipeline in (FINETUNE, RETRAIN):
        base = storage.join(root, pipeline.name)
        for name, file in storage.walk(base).items():
            folder, why = _candidate_of(name, states)
            if why:
                candidates.setdefault(storage.join(base, folder), _Candidate(why)).files.append(file)
            elif name.endswith(f"/{MANIFEST_FILE}") and _RUN_FOLDER.fullmatch(name.split("/")[0]):
                kept.append(_location(storage.join(base, name)))
    newest = datetime.now(UTC) - timedelta(days=min_age_days)
    return [
        Unused(uri, sum(file.bytes for file in candidate.files), f"{candidate.written:%Y-%m-%d}", candidate.why)
        for uri, candidate in sorted(candidates.items())
        if candidate.written <= newest and not any(f"{place}/".startswith(f"{uri}/") for place in kept)
    ]


def remove(item: Unused) -> None:
    """Delete a folder, its manifests first: what has none does not exist, so nobody finds a half-deleted one.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer; the rest goes next time.
    """
    names = sorted(storage.walk(item.uri), key=lambda name: not name.endswith(".json"))
    for name in names:
        storage.remove_file(storage.join(item.uri, name))


def _candidate_of(name: str, states: dict[str, str]) -> tuple[str, str]:
    """The folder that a file would go with, and why it might; no reason if it stays in any case."""
    parts = name.split("/")
    if parts[0] == CACHE_NAME and len(parts) > 2:
        return "/".join(parts[:2]), "no run's shards lie here"
    if not _RUN_FOLDER.fullmatch(parts[0]):
        return "", ""
    if parts[0] not in states:
        return parts[0], "its run is gone"
    if states[parts[0]] in OVER and states[parts[0]] == "SUCCEEDED" and _CHECKPOINTS in parts[:-1]:
        return "/".join(parts[: parts.index(_CHECKPOINTS) + 1]), "its run succeeded"
    return "", ""


def _location(manifest_uri: str) -> str:
    try:
        return str(json.loads(storage.read_bytes(manifest_uri)).get("location") or manifest_uri)
    except (ValueError, AttributeError):
        return manifest_uri


def _registered_models(cluster: Cluster) -> list[str]:
    """Where the versions of registered models lie."""
    os.environ.setdefault(environment.TRACKING_URI.name, cluster.profile.mlflow.tracking_uri)
    return [str(version.source) for version in list_versions(mlflow_client()) if version.source]
