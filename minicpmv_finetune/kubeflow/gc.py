"""Find folders that nothing refers to: artifacts of deleted runs, unused shards, and checkpoints that are not needed.

Below `<root>/<pipeline>/` Kubeflow stores one folder per run. The shards that preprocess keeps for later runs are in
`<root>/minicpmv-shards`, those of 0.1.0 in `<root>/<pipeline>/shards-cache`. These folders are unused:

- the folder of a run that is no longer on the server, if it contains no registered model of MLflow; where no MLflow is
  named, if the run registered none;
- shards whose cache key is in no run's manifest;
- checkpoints of a run that succeeded, because they serve only to continue after an interruption;
- below `<root>/minicpmv-checkpoints/`, those of a training that is finished, or that nobody went on with for a month,
  unless a run holds the lease on them.

Folders that were written to recently are never unused, because they may belong to a run that has just started. If the
server or MLflow does not answer, nothing is unused.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from minicpmv_finetune import environment, storage
from minicpmv_finetune.components.train.checkpoint_place import CHECKPOINTS, FINISHED_FILE, LEASE_FILE
from minicpmv_finetune.errors import AccessError, UserError
from minicpmv_finetune.pipelines import all_pipelines
from minicpmv_finetune.run_records import read_outcome
from minicpmv_finetune.shards.format import CACHE_NAME, MANIFEST_FILE, SHARED_CACHE_NAME
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.registry import list_versions
from minicpmv_finetune.tracking.step_runs import mlflow_client

from .client import Cluster
from .store import RUN_ID, pipeline_root, use_store
from .tracking_server import use_tracking

_CHECKPOINTS = "checkpoints"
_NO_RUN = "no run uses these shards"
_REGISTERED = ("promoted", "challenger")  # the outcomes of a run that registered a model
_LEASE_AGE = timedelta(hours=1)  # a run that trains writes its lease every few minutes
_ABANDONED_AGE = timedelta(days=30)


@dataclass(frozen=True)
class UnusedFolder:
    """A folder that can be deleted.

    Attributes:
        uri: Address of the folder.
        bytes: Size of its files.
        written: Day when a file in it was last written.
        why: Reason why it is unused.
    """

    uri: str
    bytes: int
    written: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    """A folder that is unused if no registered model and no manifest refers to it."""

    why: str
    files: list[storage.StoredFile] = field(default_factory=list)

    @property
    def written(self) -> datetime:
        """When a file in the folder was last written."""
        return max(file.written for file in self.files)


def find_unused(cluster: Cluster, root: str, min_age_days: int) -> list[UnusedFolder]:
    """Folders below the pipeline root that nothing refers to.

    Args:
        cluster: The server whose runs count. Every run below `root` must belong to this server and namespace.
        root: The pipeline root; empty uses the profile's, else the one that the server uses.
        min_age_days: Days since the folder was last written to.

    Raises:
        UserError: The pipeline root is not known.
        RetryableError: The server, the store or MLflow does not answer.
    """
    root = root or _root(cluster)
    use_store(cluster.profile)
    states = {str(run.run_id): str(run.state) for run in cluster.runs()}
    is_tracked = use_tracking(cluster.profile)
    referenced = _list_registered_models() if is_tracked else []
    registering: set[str] = set()
    candidates: dict[str, _Candidate] = {}
    for pipeline in all_pipelines().values():
        base = storage.join(root, pipeline.name)
        for name, file in storage.walk(base).items():
            folder, why = _candidate_of(name, states)
            if why:
                place = storage.join(base, folder)
                candidates.setdefault(place, _Candidate(why)).files.append(file)
                if "register" in name.split("/")[1:-1]:
                    registering.add(place)
            elif name.endswith(f"/{MANIFEST_FILE}") and RUN_ID.fullmatch(name.split("/")[0]):
                referenced.append(_read_shards_location(storage.join(base, name)))
    shared = storage.join(root, SHARED_CACHE_NAME)
    for name, file in storage.walk(shared).items():
        folder = storage.join(shared, name.partition("/")[0])
        candidates.setdefault(folder, _Candidate(_NO_RUN)).files.append(file)
    candidates |= _unused_checkpoints(storage.join(root, CHECKPOINTS))
    for folder in () if is_tracked else _folders_of_registered(registering):
        del candidates[folder]
    newest = datetime.now(UTC) - timedelta(days=min_age_days)
    prefixes = [f"{_as_s3(uri)}/" for uri in referenced]
    return [
        UnusedFolder(
            folder, sum(file.bytes for file in candidate.files), f"{candidate.written:%Y-%m-%d}", candidate.why
        )
        for folder, candidate in sorted(candidates.items())
        if candidate.written <= newest and not any(uri.startswith(f"{_as_s3(folder)}/") for uri in prefixes)
    ]


def _root(cluster: Cluster) -> str:
    try:
        return pipeline_root(cluster.profile)
    except AccessError as error:
        raise UserError(f"gc: {str(error).rstrip('.')}; or give --root.") from error


def _unused_checkpoints(base: str) -> dict[str, _Candidate]:
    """The folders of checkpoints that no run will go on from."""
    folders: dict[str, dict[str, storage.StoredFile]] = {}
    for name, file in storage.walk(base).items():
        folder, _, rest = name.partition("/")
        if rest:
            folders.setdefault(folder, {})[rest] = file
    now, unused = datetime.now(UTC), dict[str, _Candidate]()
    for folder, files in folders.items():
        candidate = _Candidate("its training is finished", list(files.values()))
        if LEASE_FILE in files and now - files[LEASE_FILE].written < _LEASE_AGE:
            continue
        if FINISHED_FILE not in files:
            if now - candidate.written < _ABANDONED_AGE:
                continue
            candidate = _Candidate("nobody has gone on from these checkpoints for a month", candidate.files)
        unused[storage.join(base, folder)] = candidate
    return unused


def _as_s3(uri: str) -> str:
    """The URI with the scheme that the registry uses; `minio://` names the same objects."""
    return f"s3://{uri.removeprefix('minio://')}" if uri.startswith("minio://") else uri


def delete(folder: UnusedFolder) -> None:
    """Delete a folder, its manifests first: shards without a manifest do not exist, so none are found half deleted.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer; the next call deletes the rest.
    """
    names = sorted(storage.walk(folder.uri), key=lambda name: not name.endswith(".json"))
    for name in names:
        storage.remove_file(storage.join(folder.uri, name))


def _candidate_of(name: str, states: dict[str, str]) -> tuple[str, str]:
    """The folder with which a file would be deleted, and the reason; both are empty if the file must stay."""
    parts = name.split("/")
    if parts[0] == CACHE_NAME and len(parts) > 2:
        return "/".join(parts[:2]), _NO_RUN
    if not RUN_ID.fullmatch(parts[0]):
        return "", ""
    if parts[0] not in states:
        return parts[0], "its run was deleted"
    if states[parts[0]] == "SUCCEEDED" and _CHECKPOINTS in parts[:-1]:
        return "/".join(parts[: parts.index(_CHECKPOINTS) + 1]), "its run succeeded"
    return "", ""


def _read_shards_location(manifest_uri: str) -> str:
    """The folder with the shards of a manifest, or the manifest itself if it names none."""
    try:
        return str(json.loads(storage.read_bytes(manifest_uri)).get("location") or manifest_uri)
    except (ValueError, AttributeError):
        return manifest_uri


def _folders_of_registered(folders: set[str]) -> set[str]:
    """Those of some runs' folders whose run registered a model, as far as it has said so; one of 0.1.0 says nothing."""
    outcomes = {folder: read_outcome(folder) for folder in folders}
    kept = {folder for folder, found in outcomes.items() if found is None or found.result in _REGISTERED}
    if kept:
        print_sentence(
            f"note: {len(kept)} folders are kept, because their runs registered a model; name MLflow "
            f"({environment.MLFLOW}) to see which models are registered still.",
        )
    return kept


def _list_registered_models() -> list[str]:
    """Addresses of all versions of registered models."""
    return [str(version.source) for version in list_versions(mlflow_client()) if version.source]
