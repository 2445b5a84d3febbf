"""What a run leaves in the store for everybody who asks how it ended: the sentences of failed steps, and its outcome.

Kubeflow's server says neither: `error` of a failed run and of its tasks stays empty, a run whose model was not
promoted is a success like any other, and a failed step's artifacts are never uploaded. So a step writes at the root of
its run, where one request finds it, whatever the run's steps are called:

    <pipeline root>/<pipeline>/<run id>/failed_steps/<step>.json    FailedStep; removed when the step starts again
                                                                    (preprocess-part[1]: preprocess-part-1.json)
    <pipeline root>/<pipeline>/<run id>/outcome.json                Outcome; the last one counts

A run on this machine has the same files in its folder. `notify` reads both, and so may everybody who lists runs. A step
that was killed (no memory, deleted pod) writes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from minicpmv_finetune import environment, storage

from .errors import RetryableError, UserError

FAILED_STEPS = "failed_steps"
OUTCOME_FILE = "outcome.json"

Result = Literal["promoted", "challenger", "not registered", "passed the gate", "failed the gate", "nothing new"]

_root: ContextVar[str] = ContextVar("root of the run that this process works for", default="")


class FailedStep(BaseModel):
    """`failed_steps/<step>.json`: why a step failed."""

    model_config = ConfigDict(frozen=True)

    step: str
    sentence: str
    exit_code: int
    """2 for a mistake that only the user can fix, 75 for a fault that outlived all attempts, another one for a bug."""


class Outcome(BaseModel):
    """`outcome.json`: what a run came to that did not fail."""

    model_config = ConfigDict(frozen=True)

    result: Result
    sentence: str


def place_of(output_uri: str) -> tuple[str, str]:
    """The root of the run and the name of the step to which an output belongs; empty outside a pipeline run."""
    run = environment.PIPELINE_RUN_ID.read()
    above, found, below = output_uri.rpartition(f"/{run}/")
    if not run or not found:
        return "", ""
    return f"{above}/{run}", below.split("/")[0]


@contextmanager
def working_for(output_uri: str) -> Iterator[None]:
    """For a block, `write_outcome` writes to the run to which this output belongs."""
    token = _root.set(place_of(output_uri)[0])
    try:
        yield
    finally:
        _root.reset(token)


def folder_beside_runs(name: str) -> str:
    """A folder beside that of the run that this process works for, for what its runs share; empty outside a run."""
    root = _root.get()
    return storage.join(storage.parent(root), name) if root else ""


def write_failed_step(output_uri: str, sentence: str, exit_code: int, step: str = "") -> None:
    """Write why the step failed to which an output belongs; a store that cannot be written to changes nothing.

    Args:
        output_uri: Any output of the step.
        sentence: Why it failed.
        exit_code: With which it ends.
        step: Name of the step, with its number in a loop; empty for the name of its folder, which loops share.
    """
    root, folder = place_of(output_uri)
    if root:
        failed = FailedStep(step=step or folder, sentence=sentence, exit_code=exit_code)
        _write(_record_of(root, failed.step), failed)


def forget_failed_step(output_uri: str, step: str = "") -> None:
    """Remove what an earlier attempt at this step wrote; the arguments are those of `write_failed_step`."""
    root, folder = place_of(output_uri)
    if root:
        with suppress(UserError, RetryableError):
            storage.remove_file(_record_of(root, step or folder))


def _record_of(root: str, step: str) -> str:
    # Brackets are wildcards in many programs.
    return storage.join(root, f"{FAILED_STEPS}/{step.replace('[', '-').replace(']', '')}.json")


def read_failed_steps(root: str) -> list[FailedStep]:
    """The steps of a run that failed, by name.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    folder = storage.join(root, FAILED_STEPS)
    found = []
    for name in sorted(storage.list_files(folder)):
        with suppress(ValidationError):
            found.append(FailedStep.model_validate_json(storage.read_bytes(storage.join(folder, name))))
    return found


def write_outcome(result: Result, sentence: str) -> None:
    """Write what the run came to that this process works for; outside a run nothing is written."""
    if root := _root.get():
        _write(storage.join(root, OUTCOME_FILE), Outcome(result=result, sentence=sentence))


def read_outcome(root: str) -> Outcome | None:
    """What a run came to; None if it has not said so.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    if OUTCOME_FILE not in storage.list_files(root):
        return None
    with suppress(ValidationError):
        return Outcome.model_validate_json(storage.read_bytes(storage.join(root, OUTCOME_FILE)))
    return None


def _write(uri: str, record: BaseModel) -> None:
    with suppress(UserError, RetryableError):
        storage.write_bytes(uri, record.model_dump_json().encode())
