"""The folder of a training's checkpoints that every run of the same content finds, and one run at a time writes to.

Kubeflow gives each start of a pipeline other output addresses, also when Argo begins the same run again. So where the
address of the checkpoints contains `{digest}`, that stands for the training's own digest: any later attempt, and any
other run of the same data, base model and flags, goes on from what is there.

    <pipeline root>/minicpmv-checkpoints/<digest>/checkpoint-N/, checkpoint-N.json    see `checkpoints`
                                                  lease.json                           who writes here, and until when
                                                  finished.json                        the training is finished
    <pipeline root>/minicpmv-checkpoints/<digest>-<run>/                               the same, trained apart

A number of processes other than one is part of the name, because checkpoints of another number cannot be continued.
Two runs of the same content would overwrite each other's files. So the first one holds a lease, which it renews while
it trains; the second one trains apart, in a folder of its own, and says so. A lease that is not renewed expires, and a
run that starts again takes over its own.
"""

import socket
import threading
import time
import uuid
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.run_records import place_of
from minicpmv_finetune.terminal import print_sentence

CHECKPOINTS = "minicpmv-checkpoints"
PLACEHOLDER = "{digest}"
LEASE_FILE = "lease.json"
FINISHED_FILE = "finished.json"
_LEASE_SECONDS = 600.0  # longer than a store or a node is usually out of reach
_SETTLE_SECONDS = 2.0  # after which two runs that wrote at the same moment see the same lease


class _Lease(BaseModel):
    """`lease.json`."""

    model_config = ConfigDict(frozen=True)

    holder: str
    expires: float


class Lease:
    """The right to write to a folder that other runs know too."""

    def __init__(self, folder: str, holder: str) -> None:
        """Describe a lease; nothing is read or written yet.

        Args:
            folder: URI of the folder.
            holder: Name of the run that wants it.
        """
        self.folder = folder
        self.holder = holder
        self._uri = storage.join(folder, LEASE_FILE)
        self._ended = threading.Event()
        self._writing = threading.Lock()  # a renewal that has begun would write the lease again after its release

    def take(self) -> str:
        """Take the lease, and renew it until `release`.

        Returns:
            The run that holds it instead; empty if it is taken.

        Raises:
            UserError: Access is denied.
            RetryableError: The store does not answer.
        """
        if other := self._other_holder():
            return other
        self._write()
        # Not every store can write on a condition, so the last of several writers wins.
        time.sleep(_SETTLE_SECONDS)
        if other := self._other_holder():
            return other
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return ""

    def is_held(self) -> bool:
        """Whether this run may write; not if it was out of reach for so long that another one took the lease over.

        Raises:
            UserError: Access is denied.
            RetryableError: The store does not answer.
        """
        found = self._read()
        return found is None or found.holder == self.holder

    def release(self, is_finished: bool) -> None:
        """Let others write, and note whether the training is finished; without the store the lease expires."""
        self._ended.set()
        with suppress(UserError, RetryableError), self._writing:
            if self.is_held():
                if is_finished:
                    storage.write_bytes(storage.join(self.folder, FINISHED_FILE), b"{}")
                storage.remove_file(self._uri)

    def _renew(self) -> None:
        while not self._ended.wait(_LEASE_SECONDS / 5):
            with suppress(UserError, RetryableError), self._writing:
                if self._ended.is_set() or not self.is_held():
                    return
                self._write()

    def _other_holder(self) -> str:
        found = self._read()
        return found.holder if found and found.holder != self.holder and found.expires > time.time() else ""

    def _read(self) -> _Lease | None:
        if LEASE_FILE not in storage.list_files(self.folder):
            return None
        with suppress(ValidationError):
            return _Lease.model_validate_json(storage.read_bytes(self._uri))
        return None

    def _write(self) -> None:
        lease = _Lease(holder=self.holder, expires=time.time() + _LEASE_SECONDS)
        storage.write_bytes(self._uri, lease.model_dump_json().encode())


def checkpoints_of(adapter_uri: str) -> str:
    """The address of the checkpoints of a pipeline's train step, with `{digest}` if all runs share a store.

    A run on this machine goes on in its own folder, and keeps its checkpoints there.

    Args:
        adapter_uri: URI of the step's output.
    """
    run_root, _ = place_of(adapter_uri)
    if not run_root or not storage.is_object_uri(adapter_uri):
        return storage.join(storage.parent(adapter_uri), "checkpoints")
    pipeline_root = storage.parent(storage.parent(run_root))
    return storage.join(pipeline_root, f"{CHECKPOINTS}/{PLACEHOLDER}")


def choose_place(uri: str, digest: str, world_size: int, from_beginning: bool) -> tuple[str, Lease | None]:
    """The folder that a training writes its checkpoints to.

    Args:
        uri: Address with `{digest}`.
        digest: Digest of the training.
        world_size: Number of processes.
        from_beginning: Whether checkpoints of other runs are not wanted.

    Returns:
        The folder, and the lease on it, which a folder of the run's own has too, so that `gc` knows when it is not
        needed any more; None on this machine.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    shared = uri.replace(PLACEHOLDER, digest if world_size == 1 else f"{digest}-{world_size}-processes")
    if not storage.is_object_uri(uri):
        return shared, None  # two processes of one machine are kept apart by the folder's lock
    run = environment.PIPELINE_RUN_ID.read() or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    own = f"{shared}-{run}"
    if from_beginning or _has_checkpoints(own):
        return own, _own_lease(own, run)
    lease = Lease(shared, run)
    if other := lease.take():
        print_sentence(
            f"run {other} trains the same at this moment, so this run trains apart: its checkpoints are in {own}",
        )
        return own, _own_lease(own, run)
    return shared, lease


def _own_lease(folder: str, run: str) -> Lease:
    lease = Lease(folder, run)
    lease.take()
    return lease


def _has_checkpoints(folder: str) -> bool:
    return any(name.startswith("checkpoint-") for name in storage.list_files(folder))
