"""Markers of permanent errors, so that Kubeflow's retries of a task that cannot succeed end at once.

Kubeflow Pipelines sees no exit code: its launcher swallows it, and a retry policy has no condition on one. So a task
that ends with a permanent error writes a marker beside its outputs. An attempt that Argo starts again finds the marker
of the same inputs and ends at once with the same sentence, and `minicpmv-finetune run` recovers exit code 2 from it.

A person who presses Retry has removed the cause, so that attempt must look again. Kubeflow starts it with the same
outputs, but with `KFP_RETRY_INDEX=0`, whereas an attempt that Argo starts again has a higher index. So a first attempt
removes the marker. What people read about a failure is written to the root of the run, see `run_records`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from minicpmv_finetune import environment, storage

from .errors import RetryableError, SentenceExit, StoppedError, UserError, end_process, explain_disk_errors, first_line
from .run_records import forget_failed_step, write_failed_step

MARKER_NAME = "permanent_error.json"


@contextmanager
def permanent_error_marked(output_uri: str, inputs: Mapping[str, object], step: str = "") -> Iterator[None]:
    """Run a component's body so that a user's mistake is remembered across Kubeflow's retries.

    Marker and record only help: if they cannot be read or written, the step continues without them.

    Args:
        output_uri: URI of any of the task's output artifacts; the marker is stored beside it.
        inputs: Inputs of the task; a marker that was written for other inputs is ignored.
        step: Name of the step, with its number in a loop; empty for the name of its folder.

    Raises:
        SystemExit: The body raised one of the two errors; its sentence is printed and its exit code is used.
    """
    marker_uri = storage.join(storage.parent(output_uri), MARKER_NAME)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    message = read_marker(marker_uri, digest)
    if message is not None and _is_repetition():
        write_failed_step(output_uri, message, UserError.exit_code, step)
        end_process(UserError(message))
    if message is not None:
        _remove_marker(marker_uri)
    forget_failed_step(output_uri, step)
    try:
        with explain_disk_errors():
            yield
    except UserError as error:
        with suppress(UserError, RetryableError):
            storage.write_bytes(marker_uri, json.dumps({"inputs": digest, "message": str(error)}).encode())
        write_failed_step(output_uri, str(error), error.exit_code, step)
        end_process(error)
    except StoppedError as error:
        # About a second is left. Somebody deleted the pod or cancelled the run, and the step did not fail.
        end_process(error)
    except RetryableError as error:
        write_failed_step(output_uri, str(error), error.exit_code, step)
        end_process(error)
    except SentenceExit as ended:
        write_failed_step(output_uri, ended.sentence, int(str(ended.code)), step)
        raise
    except Exception as error:
        write_failed_step(output_uri, f"{type(error).__name__}: {first_line(error)}; see the step's log", 1, step)
        raise


def _is_repetition() -> bool:
    """Whether Argo has started this attempt, because an earlier one ended."""
    return environment.RETRY_INDEX.read().strip() not in ("", "0")


def _remove_marker(marker_uri: str) -> None:
    with suppress(UserError, RetryableError):
        storage.remove_file(marker_uri)


def read_marker(marker_uri: str, inputs: str | None = None) -> str | None:
    """The error message of an earlier attempt with the same inputs, or with any; None if there was none."""
    with suppress(UserError, RetryableError, ValueError, KeyError, AttributeError):
        marker = json.loads(storage.read_bytes(marker_uri))
        if inputs in (None, marker.get("inputs")):
            return str(marker["message"])
    return None
