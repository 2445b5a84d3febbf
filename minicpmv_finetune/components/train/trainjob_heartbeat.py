"""A sign of life in the store from the step that follows a TrainJob, so that nodes do not train for nobody.

A step that is killed (out of memory, a lost machine) cannot delete its TrainJob, and Kubeflow repeats it only when its
pod was lost. So the step writes a new value into a small object every minute, and each node reads it. Nodes compare
the value with the last one, not a time with their own clock. A store that does not answer is no sign of death: the
nodes need it themselves, and the step cannot write then.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError

FILE = "step-is-alive"
WRITE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
ABANDONED = (
    "The step that follows this training has given no sign of life for ten minutes, so the nodes have ended; run the "
    "step again, and it continues from the newest checkpoint."
)


def heartbeat_uri(output_uri: str) -> str:
    """Where the sign of life of a task lies: beside its output."""
    return storage.join(storage.parent(output_uri), FILE)


@contextmanager
def sign_of_life(output_uri: str, seconds: float = WRITE_SECONDS) -> Iterator[None]:
    """Tell the nodes, as long as the block runs, that somebody follows them."""
    uri, ended = heartbeat_uri(output_uri), threading.Event()

    def write(count: int) -> None:
        with suppress(UserError, RetryableError):
            storage.write_bytes(uri, f"{os.getpid()} {time.time_ns()} {count}".encode())

    def write_on() -> None:
        count = 0
        while not ended.wait(seconds):
            count += 1
            write(count)

    write(0)  # in this thread, because the first call imports boto3
    writer = threading.Thread(target=write_on, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join(timeout=5)


class LifeWatch:
    """Watches for the sign of life on a node.

    Attributes:
        is_abandoned: Whether there was none for too long.
    """

    def __init__(self, output_uri: str, patience: float = PATIENCE_SECONDS, seconds: float = WRITE_SECONDS) -> None:
        """Describe what is watched.

        Args:
            output_uri: The task's output, beside which the sign lies.
            patience: Seconds without a new sign until the step counts as dead.
            seconds: Seconds between two looks.
        """
        self.is_abandoned = False
        self._uri = heartbeat_uri(output_uri)
        self._patience, self._seconds = patience, seconds

    @contextmanager
    def watching(self, end: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> Iterator[None]:
        """Watch during the block; after too long a silence `end` is called once, by default SIGTERM to this process."""
        ended = threading.Event()
        first = self._read()

        def watch() -> None:
            last, changed = first, time.monotonic()
            while not ended.wait(self._seconds):
                value = self._read()
                if value is None or value != last:
                    last, changed = value or last, time.monotonic()
                elif time.monotonic() - changed >= self._patience:
                    self.is_abandoned = True
                    end()
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _read(self) -> bytes | None:
        """The sign; nothing where it was never written, None if the store does not answer."""
        try:
            return storage.read_bytes(self._uri)
        except UserError:
            return b""
        except Exception:  # of whatever kind: a watch that ended without a word would leave the nodes alone
            return None
