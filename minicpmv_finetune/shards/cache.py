"""A verified local copy of shards, shared by the processes of a machine.

The manifest that the train step gets names the folder of the files in object storage. The first process downloads
them, several at once, while the other processes wait. Every file is compared with its recorded hash before its first
use; a file that was damaged on this disk or during the transfer is downloaded again. If the disk is too small for the
files, the copy contains only the manifest, and `ShardReader` reads single rows from the store.
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

_SPARE_BYTES = 2**30  # space of the disk that the copy leaves free
_ATTEMPTS = 2


def open_shards(uri: str, cache_dir: Path | None = None) -> Path:
    """Return a local folder of verified shards for `ShardReader`.

    Several processes of a machine may call it at the same time. A later call, also in another process, does not verify
    files again that have not changed since.

    Args:
        uri: A shards folder written by preprocess, local or `s3://`.
        cache_dir: Folder for downloads; by default a temporary folder.

    Raises:
        UserError: There are no finished shards, or files are damaged at their source.
        RetryableError: The store does not answer.
    """
    is_stored = storage.is_object_uri(uri)
    folder = storage.fetch(storage.join(uri, MANIFEST_FILE)).parent if is_stored else storage.local_path(uri)
    manifest = read_manifest(folder)
    location = manifest.location or (uri if is_stored else "")
    cache = storage.cache_folder(cache_dir) / "shards"
    if not location:
        with _locked(cache / _cache_name(str(folder.absolute()), manifest)) as record:
            if _unverified(folder, manifest, record):
                verify_shards(folder, manifest)
                _write_record(folder, manifest, record)
        return folder
    copy = cache / _cache_name(location, manifest)
    with _locked(copy) as record:
        manifest = manifest.model_copy(update={"location": location})
        storage.write_bytes(str(copy / MANIFEST_FILE), f"{manifest.model_dump_json(indent=1)}\n".encode())
        unverified = _unverified(copy, manifest, record)
        if unverified and _fits_on_disk(copy, manifest):
            _download(copy, damaged_shards(copy, unverified), location)
            _write_record(copy, manifest, record)
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
            f"{storage.join(location, shard.file)}: its content differs from {MANIFEST_FILE} after a second download "
            f"too; delete {location} and run preprocess again."
        )

    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        for _ in pool.map(download, shards):
            pass


def _fits_on_disk(copy: Path, manifest: Manifest) -> bool:
    """Whether the disk has room for the files that are not downloaded yet."""
    downloaded = sum(path.stat().st_size for path in copy.glob("*.parquet"))
    return shutil.disk_usage(copy).free - _SPARE_BYTES >= manifest.bytes - downloaded


def _cache_name(source: str, manifest: Manifest) -> str:
    hashes = "".join(shard.sha256 for shard in manifest.files)
    return hashlib.sha256(f"{source}\n{manifest.key}\n{hashes}".encode()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Create a folder and lock it for this process; yields the path of the record of its verified files."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another cache folder.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / ".verified.json"


def _unverified(folder: Path, manifest: Manifest, record: Path) -> list[Shard]:
    """The shards whose file was not verified, or has changed since."""
    try:
        verified = json.loads(record.read_text())
    except (OSError, ValueError):
        verified = {}
    return [shard for shard in manifest.files if verified.get(shard.file, [None]) != _file_state(folder / shard.file)]


def _write_record(folder: Path, manifest: Manifest, record: Path) -> None:
    states = {shard.file: _file_state(folder / shard.file) for shard in manifest.files}
    storage.write_bytes(str(record), json.dumps(states).encode())


def _file_state(path: Path) -> list[int]:
    """Size, time of the last change and inode of a file: one of them changes with each write or replacement."""
    if not path.is_file():
        return []
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]
