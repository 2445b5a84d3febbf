"""How many bytes a new feature store may have, and which old stores make room for it.

A pod is evicted, with everything on its disk, where it exceeds the limit of its volume, which the disk's free space
does not show, or where its node runs short of disk. Therefore a variable gives the pod this limit, and what the
training itself is going to write is left free.
"""

import fcntl
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

INDEX_FILE, PATCHES_FILE = "index.safetensors", "patches.bin"

_SPARE_BYTES = 2**30  # which a store leaves free beside everything else
_EVICTION_SHARE = 0.15  # of a disk: below it Kubernetes' node agent evicts pods, by its defaults
_RECENT_USE = 3600  # seconds; the process that has just found a store has opened it after this time


@dataclass(frozen=True)
class Room:
    """What a store may use.

    Attributes:
        bytes: Its largest size; negative if there is less than nothing.
        reason: How this number comes about, in a few words.
    """

    bytes: int
    reason: str

    def __str__(self) -> str:
        return f"{max(self.bytes, 0) / 1e9:.2f} GB ({self.reason})"


def find_room(cache: Path, reserve: int) -> Room:
    """Find out how large a new store in a folder may be.

    Args:
        cache: Folder on the disk in question.
        reserve: Bytes that the training is going to write to the same disk.
    """
    disk = shutil.disk_usage(cache)
    spare = reserve + _SPARE_BYTES
    kept = f"{spare / 1e9:.0f} GB are kept for checkpoints and the result"
    room = Room(disk.free - spare, f"{disk.free / 1e9:.0f} GB are free, of which {kept}")
    if environment.KUBERNETES_HOST.read():
        reason = f"{room.reason}, and {_EVICTION_SHARE:.0%} of the disk, below which pods are evicted"
        room = Room(room.bytes - int(_EVICTION_SHARE * disk.total), reason)
    limit = _limit_of(cache)
    if limit is None:
        return room
    used = _used_bytes(Path(tempfile.gettempdir()))
    left = limit - used - spare
    if left >= room.bytes:
        return room
    return Room(left, f"the volume's limit is {limit / 1e9:.0f} GB, of which {used / 1e9:.0f} GB are used and {kept}")


def _limit_of(cache: Path) -> int | None:
    """The limit of the volume for temporary files, if there is one and the folder is on it."""
    text = environment.SCRATCH_LIMIT.read()
    if not text or not cache.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve()):
        return None
    from kubernetes.utils.quantity import parse_quantity  # takes a second, and only a pod has a limit

    try:
        return int(parse_quantity(text.strip()))
    except ValueError as error:
        raise UserError(f"{environment.SCRATCH_LIMIT}={text}: not a size; give one such as 500Gi.") from error


def _used_bytes(folder: Path) -> int:
    """Bytes on the disk of all files below a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).lstat().st_blocks * 512
            except FileNotFoundError:  # another process deletes its temporary files
                continue
    return total


def delete_unused_stores(stores: Path, needed: int, reserve: int, keep: set[Path]) -> None:
    """Delete the stores that were not used for the longest time, if that makes enough room; open ones stay.

    Args:
        stores: Folder of all stores.
        needed: Bytes that are needed for new ones.
        reserve: Bytes that the training is going to write to the same disk.
        keep: Stores that are not deleted.
    """
    lacking = needed - find_room(stores.parent, reserve).bytes
    deleted: list[Path] = []
    for index in sorted(stores.glob(f"[!.]*/{INDEX_FILE}"), key=lambda index: index.stat().st_mtime):
        if lacking <= 0 or index.parent in keep or time.time() - index.stat().st_mtime < _RECENT_USE:
            continue
        with index.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        deleted.append(index.parent)
        lacking -= (index.parent / PATCHES_FILE).stat().st_size
    if lacking <= 0:
        for store in deleted:
            shutil.rmtree(store, ignore_errors=True)
