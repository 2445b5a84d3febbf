"""How a component runs its step: again after a fault, never again after a mistake, and with its end said aloud.

A stock Argo controller never starts a container again that ended by itself, whatever its exit code; it only replaces a
pod that was lost. So a step repeats itself after a fault outside of it (storage, MLflow, a node of a training): in
the same process, a bounded number of times, with growing waits (`MINICPMV_FINETUNE_RETRY_WAITS`, which a profile sets).
Each fault is in the log and in the step's MLflow run. A mistake that only the user can fix ends the step at once, and
so does a signal.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from minicpmv_finetune import environment
from minicpmv_finetune.cores import share_cores
from minicpmv_finetune.permanent_errors import permanent_error_marked
from minicpmv_finetune.progress import quieten_libraries
from minicpmv_finetune.run_records import working_for
from minicpmv_finetune.tracking.step_runs import note_failure, note_fault

from .errors import RetryableError, SentenceExit, StoppedError, UserError, explain_disk_errors
from .terminal import print_sentence

NO_RETRY = "none"
"""Value of the variable for a step that ends at its first fault; an empty one means the default."""

T = TypeVar("T")

# A component imports this module first, and its libraries read these settings when they are imported.
quieten_libraries()
share_cores()


def run_step(step: str, output_uri: str, inputs: Mapping[str, object], work: Callable[[], T]) -> T:
    """Do the work of a component.

    Args:
        step: Name of the step, with its number if several pods share it: preprocess-part[1].
        output_uri: URI of any of the task's output artifacts, see `permanent_error_marked`.
        inputs: Inputs of the task.
        work: Body of the component; it must be able to begin again after a fault.

    Returns:
        What `work` returns.

    Raises:
        SystemExit: The step failed; its sentence is printed.
    """
    with permanent_error_marked(output_uri, inputs, step), working_for(output_uri), _noted(step):
        return _repeated(step, work)


def _repeated(step: str, work: Callable[[], T]) -> T:
    waits = _waits()
    for attempt, wait in enumerate(waits, 1):
        try:
            with explain_disk_errors():
                return work()
        except StoppedError:
            raise
        except RetryableError as fault:
            sentence = f"attempt {attempt} of {len(waits) + 1}: {str(fault).rstrip('.')}; again in {wait:g} s"
            print_sentence(f"warning: {sentence}")
            note_fault(step, attempt, sentence)
        time.sleep(wait)
    return work()


def _waits() -> list[float]:
    """Seconds before the second attempt, the third, and so on.

    Raises:
        UserError: The variable contains something else.
    """
    text = environment.RETRY_WAITS.read()
    try:
        waits = [float(word) for word in text.split()] if text.strip() != NO_RETRY else []
    except ValueError:
        waits = [-1.0]
    if any(not 0 <= wait < float("inf") for wait in waits):
        raise UserError(
            f"{environment.RETRY_WAITS}: {text!r} are not seconds; give numbers from 0, separated by spaces, such as "
            f"{environment.RETRY_WAITS.default!r}, or {NO_RETRY}."
        )
    return waits


@contextmanager
def _noted(step: str) -> Iterator[None]:
    """Note in MLflow why the step failed."""
    try:
        with explain_disk_errors():
            yield
    except StoppedError:
        raise
    except (UserError, RetryableError) as error:
        note_failure(step, str(error))
        raise
    except SentenceExit as ended:
        note_failure(step, ended.sentence)
        raise
    except Exception as error:
        note_failure(step, f"{type(error).__name__}: {error}")
        raise
