"""What a run on this machine has finished, so that the same command goes on with it.

The folder of a run is `artifacts/NAME/`, with a folder for each step. Its `run.json` says of which inputs the run is
and whether it is finished. A step that has succeeded leaves `.finished.json`, written last: what the step was made
from, and what it wrote. A step is done again if one of the two has changed since.

validate-data and plan-retraining are always done again: whether the data or the registry have changed, only they can
tell. If their results are the same, the steps after them are reused.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.permanent_errors import MARKER_NAME

RUN_FILE = "run.json"
FINISHED_FILE = ".finished.json"
LINKS = {
    "data-report.html": "validate-data/data_report",
    "rejects.jsonl": "validate-data/rejects.jsonl",
    "preprocess-report.html": "preprocess/shards_report",
    "preprocess-rejects.jsonl": "preprocess/rejects.jsonl",
    "training-report.html": "train/training_report",
    "merge-report.html": "merge/merge_report",
    "merge-report.json": "merge/merge-report.json",
    "report.html": "evaluate/evaluation_report",
    "model": "merge/model",
}
"""Links that a run leaves beside its artifacts, by the names of the results below the run's folder."""
_LOCK_FILE = ".lock"
_SECONDS_FOR_LOCK = 5.0
_READ_FOLDERS = ("base_model_uri", "lora_weight_path")
_ALWAYS_DONE = ("validate-data", "plan-retraining", "notify")
_SMALL_FILE = 1 << 24  # bytes; larger files are distinguished by size and time, because hashing them takes too long


class _RunRecord(BaseModel):
    inputs: str
    is_finished: bool = False


class FinishedStep(BaseModel):
    """`.finished.json`: what a finished step was made from, and what it wrote."""

    key: str
    outputs: dict[str, str]
    outcome: str
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        inputs: Digest of the run's inputs.
        goes_on: Whether an earlier attempt has begun the run.
    """

    path: Path
    inputs: str
    goes_on: bool

    def finished_steps(self) -> list[str]:
        """Names of the steps that the same command would not do again."""
        names = [file.parent.name for file in self.path.glob(f"*/{FINISHED_FILE}")]
        return [name for name in names if name not in _ALWAYS_DONE]

    def finish(self) -> None:
        """Record that the run is finished."""
        (self.path / RUN_FILE).write_text(_RunRecord(inputs=self.inputs, is_finished=True).model_dump_json())


def inputs_digest(pipeline: str, inputs: Mapping[str, Any]) -> str:
    """What tells the runs of a folder apart: the pipeline and the values of its inputs."""
    return hashlib.sha256(json.dumps([pipeline, inputs], sort_keys=True).encode()).hexdigest()


def open_run(artifacts: Path, pipeline: str, inputs: str) -> RunFolder:
    """The folder of the last unfinished run of these inputs, or a new one.

    Args:
        artifacts: Folder of all runs.
        pipeline: Name of the pipeline.
        inputs: Digest of the inputs.
    """
    if unfinished := unfinished_runs(artifacts, inputs):
        for marker in unfinished[-1].glob(f"*/{MARKER_NAME}"):
            marker.unlink()  # the mistake may have been corrected
        return RunFolder(unfinished[-1], inputs, goes_on=True)
    folder = artifacts / f"{pipeline}-{time.strftime('%Y%m%d-%H%M%S')}"
    while folder.exists():
        folder = folder.with_name(f"{folder.name}-2")
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(_RunRecord(inputs=inputs).model_dump_json())
    return RunFolder(folder, inputs, goes_on=False)


def unfinished_runs(artifacts: Path, inputs: str, others: bool = False) -> list[Path]:
    """Unfinished runs of these inputs, or of all others; oldest first. Runs of 0.1.0 do not count."""
    found = []
    for file in sorted(artifacts.glob(f"*/{RUN_FILE}")):
        with suppress(OSError, ValidationError):
            record = _RunRecord.model_validate_json(file.read_text())
            if not record.is_finished and (record.inputs == inputs) is not others:
                found.append(file.parent)
    return found


def remove_unfinished(artifacts: Path, inputs: str) -> None:
    """Remove the unfinished runs of these inputs, because another run of the same is wanted or finished."""
    for folder in unfinished_runs(artifacts, inputs):
        shutil.rmtree(folder)
        print(f"Removed {folder}, an unfinished run of the same inputs.")


@contextmanager
def locked(artifacts: Path) -> Iterator[int]:
    """Let no other run work in a folder.

    The lock is a file that is open. Processes that inherit it keep it as long as they live, so that no run begins while
    a step of a killed one still writes.

    Yields:
        The descriptor of the lock, for a process that is to keep it.

    Raises:
        UserError: Another run works in the folder.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    with (artifacts / _LOCK_FILE).open("a+") as lock:
        deadline = time.monotonic() + _SECONDS_FOR_LOCK
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise UserError(
                        f"{artifacts.parent}: process {lock.read().strip() or 'unknown'}, or a step that it started, "
                        "works in this folder; wait until it has ended, or give another --out."
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # the file system has no locks
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock.fileno()


class Step:
    """A step of a run, as its command describes it."""

    def __init__(self, command: Sequence[str]) -> None:
        """Read a command that kfp.local is about to run."""
        position = list(command).index("--executor_input") + 1
        self._document: dict[str, Any] = json.loads(command[position])
        self._command = [*command[:position], *command[position + 1 :]]
        outputs = self._document["outputs"]
        self.folder = Path(outputs["outputFile"]).parent
        self._outputs = {
            **{name: Path(found["artifacts"][0]["uri"]) for name, found in outputs.get("artifacts", {}).items()},
            **{name: Path(found["outputFile"]) for name, found in outputs.get("parameters", {}).items()},
            "executor_output": Path(outputs["outputFile"]),
        }

    def key(self) -> str:
        """A digest of everything that the step's outputs depend on."""
        inputs = self._document.get("inputs", {})
        artifacts = {
            name: [_identity(Path(artifact["uri"])) for artifact in found["artifacts"]]
            for name, found in inputs.get("artifacts", {}).items()
        }
        parameters = inputs.get("parameterValues", {})
        files = {text: _identity(Path(text)) for name, text in _texts(parameters) if _is_input(name, text)}
        made_from = [version("minicpmv-finetune"), self._command, parameters, artifacts, files]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def finished(self, key: str) -> FinishedStep | None:
        """How the step ended before, if it was made from the same and its outputs are unchanged."""
        if self.folder.name in _ALWAYS_DONE:
            return None
        with suppress(OSError, ValidationError):
            record = FinishedStep.model_validate_json((self.folder / FINISHED_FILE).read_text())
            if record.key == key and record.outputs == self._written():
                return record
        return None

    def clear(self) -> None:
        """Remove what an earlier attempt left and this one must not find; its checkpoints stay."""
        for name in (FINISHED_FILE, "executor_output.json"):
            (self.folder / name).unlink(missing_ok=True)
        for name in self._outputs:
            for partial in self.folder.glob(f".{name}.*"):
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)

    def finish(self, key: str, outcome: str, seconds: float) -> None:
        """Record that the step has succeeded."""
        record = FinishedStep(key=key, outputs=self._written(), outcome=outcome, seconds=seconds)
        partial = self.folder / f"{FINISHED_FILE}.partial"
        partial.write_text(record.model_dump_json(indent=1))
        partial.replace(self.folder / FINISHED_FILE)

    def _written(self) -> dict[str, str]:
        return {name: _identity(path) for name, path in self._outputs.items()}


def _identity(path: Path) -> str:
    """What tells the content of a file or folder from another; empty if there is none.

    A step's mark in its folder has the time of each file, which changes when validate-data writes the same again.
    """
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name != MARK:
            facts = file.stat()
            content = file.read_bytes() if facts.st_size <= _SMALL_FILE else f"{facts.st_size} {facts.st_mtime_ns}"
            content_digest = hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()
            digest.update(f"{file.relative_to(path)} {content_digest}\n".encode())
    return digest.hexdigest()


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with the name that it belongs to."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)


def _is_input(name: str, text: str) -> bool:
    """Whether a text is the path of something that the step reads; of folders, only those known to be read."""
    with suppress(OSError, ValueError):  # no file can have a name that is too long or contains a zero byte
        path = Path(text)
        return path.is_absolute() and (path.is_file() or (name in _READ_FOLDERS and path.is_dir()))
    return False
