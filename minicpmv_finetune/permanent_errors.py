"""Markers of permanent errors, so that Kubeflow's retries of a task that cannot succeed end at once.

Kubeflow Pipelines sees no exit code: its launcher swallows it, and a retry policy has no condition on one. So a task
that ends with a permanent error writes a marker beside its outputs. An attempt that finds the marker of the same inputs
ends at once with the same sentence, and `minicpmv-finetune run` recovers exit code 2 from it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from minicpmv_finetune import storage

from .errors import RetryableError, UserError, end_process, explain_disk_errors

MARKER_NAME = "permanent_error.json"


@contextmanager
def permanent_error_marked(output_uri: str, inputs: Mapping[str, object]) -> Iterator[None]:
    """Run a component's body so that a user's mistake is remembered across Kubeflow's retries.

    The marker only saves time: if it cannot be read or written, the step continues without it.

    Args:
        output_uri: URI of any of the task's output artifacts; the marker is stored beside it.
        inputs: Inputs of the task; a marker that was written for other inputs is ignored.

    Raises:
        SystemExit: The body raised one of the two errors; its sentence is printed and its exit code is used.
    """
    marker_uri = storage.join(storage.parent(output_uri), MARKER_NAME)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    message = _read_marker(marker_uri, digest)
    if message is not None:
        end_process(UserError(message))
    try:
        with explain_disk_errors():
            yield
    except UserError as error:
        with suppress(UserError, RetryableError):
            storage.write_bytes(marker_uri, json.dumps({"inputs": digest, "message": str(error)}).encode())
        end_process(error)
    except RetryableError as error:
        end_process(error)


def _read_marker(marker_uri: str, inputs: str) -> str | None:
    """The error message of an earlier attempt with the same inputs; None if there was none."""
    with suppress(UserError, RetryableError, ValueError):
        marker = json.loads(storage.read_bytes(marker_uri))
        if marker.get("inputs") == inputs:
            return str(marker["message"])
    return None
