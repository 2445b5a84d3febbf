"""What each pod of a TrainJob runs: torchrun with this machine's processes; the first pod uploads the result.

    python -m minicpmv_finetune.components.train.trainjob_pod OUTPUT_URI --data_path s3://…/shards …

Kubeflow Trainer sets PET_* variables with the number of nodes and the address where they meet. The step that follows
the TrainJob reads how the pod ended from its exit code, and the sentence of an error from its termination message.
"""

import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError, end_process, first_line
from minicpmv_finetune.reports.training_record import RECORD_FILE

from .launch import CrashExit, launch
from .trainjob_heartbeat import ABANDONED, LifeWatch

TERMINATION_MESSAGE = Path("/dev/termination-log")
"""Kubernetes reads a container's termination message from this file, unless the manifest names another one."""

STUCK_SECONDS = 30.0
"""After SIGTERM, how long a node without training processes may take to end by itself."""

CRASH = re.compile(r"exit code (\d+): ")
"""How the message of a crash begins that another attempt would only repeat. Its pod ends with the code of a mistake,
with which JobSet starts no node again."""


def run_node(output_uri: str, flags: Sequence[str], termination_message: Path = TERMINATION_MESSAGE) -> None:
    """Train as one node among several; the first node uploads the result.

    Args:
        output_uri: `s3://` folder that receives the result. The record is uploaded last; a result without it does not
            count.
        flags: Flags of the training script, without an output folder.
        termination_message: File that receives the sentence of an error.

    Raises:
        SystemExit: With the exit code of a user's mistake or of a temporary fault, after its sentence was printed.
    """
    watch = LifeWatch(output_uri)
    try:
        with (
            _ending_on_sigterm(lambda: _end_stuck(watch, termination_message)),
            tempfile.TemporaryDirectory() as folder,
            _crashes_named(),
        ):
            trained = Path(folder) / "trained"
            _launch([*flags, "--output_dir", str(trained)], watch)
            if environment.NODE_RANK.read() == "0":
                with _without_sigterm():
                    _upload(trained, output_uri)
    except (UserError, RetryableError) as error:
        # Outside a pod this file cannot be written.
        with suppress(OSError):
            termination_message.write_text(str(error))
        end_process(error)


def _launch(flags: Sequence[str], watch: LifeWatch) -> None:
    try:
        with watch.watching():
            launch(flags)
    except CrashExit as crash:
        raise UserError(f"exit code {crash.code}: {crash.sentence}") from None
    except (RetryableError, SystemExit):
        if watch.is_abandoned:
            raise UserError(ABANDONED) from None
        raise


@contextmanager
def _crashes_named() -> Iterator[None]:
    """Turn a bug outside of the training processes into a crash that no restart of the nodes repeats.

    What another node's end raises here in torchrun's agent (its rendezvous, and torch's RuntimeError) stays as it is,
    and so does what a network or a disk may raise: those nodes are worth a restart.
    """
    try:
        yield
    except (UserError, RetryableError, RuntimeError, OSError, EOFError):
        raise
    except Exception as error:
        if "rendezvous" in type(error).__module__:
            raise
        traceback.print_exc()
        raise UserError(f"exit code 1: {type(error).__name__}: {first_line(error)}") from None


def _upload(folder: Path, uri: str) -> None:
    def upload(path: Path) -> None:
        storage.upload_file(path, storage.join(uri, path.relative_to(folder).as_posix()))

    record = folder / RECORD_FILE
    first, *others = sorted(path for path in folder.rglob("*") if path.is_file() and path != record)
    # The first upload imports boto3; first imports in several threads at once interfere with each other.
    upload(first)
    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        for _ in pool.map(upload, others):
            pass
    upload(record)


@contextmanager
def _ending_on_sigterm(end: Callable[[], object], patience: float = STUCK_SECONDS) -> Iterator[None]:
    """Let SIGTERM end this process also where nobody handles it: before torchrun does, and while it waits.

    This is the first process of its container, and for that one the kernel ignores a signal without a handler. And
    Python handles no signal while torch waits for other nodes, for up to 15 minutes. Such a node would keep its GPUs
    for its whole grace period. A thread sees the signal at once; it leaves the time to save to training processes.

    Args:
        end: Ends this process; called in the thread.
        patience: Seconds without a training process after which this one counts as stuck.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (received := os.read(reading, 1)) and received[0] != signal.SIGTERM:
            pass
        since = time.monotonic()
        while received and not ended.wait(patience / 20):
            if _has_children():
                since = time.monotonic()
            elif time.monotonic() - since > patience:
                end()
        os.close(reading)

    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _end_stuck(watch: LifeWatch, termination_message: Path) -> None:
    if watch.is_abandoned:
        with suppress(OSError):
            termination_message.write_text(ABANDONED)
    os._exit(USER_ERROR_EXIT if watch.is_abandoned else 128 + signal.SIGTERM)


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Use the grace period after SIGTERM: what runs here is nearly done."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_node(sys.argv[1], sys.argv[2:])
