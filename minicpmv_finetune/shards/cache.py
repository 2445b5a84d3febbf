"""A verified copy of shards on this machine, for many processes at once.

What the train step is given names its files' place in object storage, where they were uploaded as they were written.
The first process to ask downloads them, several at once; the others wait for it. Every file is compared with its
recorded hash before its first use, and one that was damaged here or on its way is fetched again. Where the disk
is too small for them, the copy holds the manifest alone, and `ShardReader` reads row by row from the store.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from .format import MANIFEST_FILE, Manifest, Shard, damaged_shards, read_manifest, verify_shards

_SPARE_BYTES = 2**30  # of the disk, left to others
_ATTEMPTS = 2


def open_shards(uri: str, cache_dir: Path | None = None) -> Path:
    """A local folder that `ShardReader` reads the shards from, whole and verified.

    Safe for many processes of a machine at once; a later call, also in another process, compares no file again that
    has not been touched since.

    Args:
        uri: a shards folder that preprocess wrote: local, or `s3://`.
        cache_dir: where downloads go; by default a temporary folder.

    Raises:
        UserError: there are no finished shards, or files are damaged where they come from.
        RetryableError: the store does not answer.
    """
    folder = storage.fetch(storage.join(uri, MANIFEST_FILE)).parent if storage.is_object_uri(uri) else Path(uri)
    manifest = read_manifest(folder)
    location = manifest.location or (uri if storage.is_object_uri(uri) else "")
    cache = storage.cache_folder(cache_dir) / "shards"
    if not location:
        with _only_one(cache / _name(str(folder.absolute()), manifest)) as marks:
            if _touched(folder, manifest, marks):
                verify_shards(folder, manifest)
                _mark(folder, manifest, marks)
        return folder
    copy = cache / _name(location, manifest)
    with _only_one(copy) as marks:
        manifest = manifest.model_copy(update={"location": location})
        storage.write_bytes(str(copy / MANIFEST_FILE), f"{manifest.model_dump_json(indent=1)}\n".encode())
        wanted = _touched(copy, manifest, marks)
        if wanted and _fit(copy, manifest):
            _download(copy, damaged_shards(copy, wanted), location)
            _mark(copy, manifest, marks)
    return copy


def _download(copy: Path, shards: Sequence[Shard], location: str) -> None:
    def download(shard: Shard) -> None:
        partial = copy / f".{shard.file}.partial"
        for _ in range(_ATTEMPTS):
            if storage.download_file(storage.join(location, shard.file), partial) == shard.sha256:
                partial.replace(copy / shard.file)
                return
        partial.unlink()
        raise UserError(
            f"{storage.join(location, shard.file)}: its content differs from {MANIFEST_FILE} also when fetched again; "
            f"delete {location} and run preprocess again."
        )

    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        for _ in pool.map(download, shards):
            pass


def _fit(copy: Path, manifest: Manifest) -> bool:
    """Whether the disk has room for what is not yet there."""
    there = sum(path.stat().st_size for path in copy.glob("*.parquet"))
    return shutil.disk_usage(copy).free - _SPARE_BYTES >= manifest.bytes - there


def _name(place: str, manifest: Manifest) -> str:
    hashes = "".join(shard.sha256 for shard in manifest.files)
    return hashlib.sha256(f"{place}\n{manifest.key}\n{hashes}".encode()).hexdigest()[:32]


@contextmanager
def _only_one(folder: Path) -> Iterator[Path]:
    """Make a folder and hold off other processes; yields the file that tells what was compared in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another cache folder.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / ".verified.json"


def _touched(folder: Path, manifest: Manifest, marks: Path) -> list[Shard]:
    """Shards whose file is not the one that was compared before."""
    try:
        known = json.loads(marks.read_text())
    except (OSError, ValueError):
        known = {}
    return [shard for shard in manifest.files if known.get(shard.file, [None]) != _identity(folder / shard.file)]


def _mark(folder: Path, manifest: Manifest, marks: Path) -> None:
    found = {shard.file: _identity(folder / shard.file) for shard in manifest.files}
    storage.write_bytes(str(marks), json.dumps(found).encode())


def _identity(path: Path) -> list[int]:
    """What changes when a file is written to or replaced."""
    if not path.is_file():
        return []
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]
