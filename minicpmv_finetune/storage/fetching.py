"""Local copies of files, folders and base models, wherever they are stored."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from minicpmv_finetune.errors import AccessError, RetryableError, UserError

from . import s3
from .failures import explain_failures, fail_missing
from .files import read_bytes, require_no_file
from .transfers import FILES_AT_ONCE
from .uris import is_object_uri, join, local_path, split_object_uri

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.@-]+")
WITHOUT_HUB = "to try without the hub, let `minicpmv-finetune tiny-base` write a small base model."
"""What a message about a hub that does not answer ends with."""


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The folder for downloads: the given one, or this user's own below the system's temporary folder."""
    return cache_dir or Path(tempfile.gettempdir()) / f"minicpmv-finetune-{os.getuid()}"


def fetch(uri: str, cache_dir: Path | None = None) -> Path:
    """A local path to the file, folder or model at `uri`, downloaded if necessary.

    Args:
        uri: A local path, `s3://…` (an object or a folder), `hf://owner/name[@revision]` or a bare hub id `owner/name`.
        cache_dir: Folder for downloads; by default the hub's cache and a temporary folder.

    Raises:
        UserError: The URI leads to nothing, or access is denied.
        RetryableError: The store does not answer.
    """
    if is_object_uri(uri):
        return _fetch_objects(uri, cache_folder(cache_dir))
    if uri.startswith("hf://"):
        return _fetch_model(uri.removeprefix("hf://"), cache_dir)
    path = local_path(uri)
    with explain_failures(uri):
        if path.exists():
            return path
    if _HUB_ID.fullmatch(uri):
        try:
            return _fetch_model(uri, cache_dir)
        except RetryableError as error:
            # A mistyped path is more likely than a hub that is down.
            raise UserError(
                f"{uri}: no such local path, and the hub cannot be reached to look for a model of that name; give a "
                f"checkpoint's folder, an s3:// URI, or hf://{uri} to wait for the hub; {WITHOUT_HUB}"
            ) from error
    return fail_missing(uri)


def _fetch_objects(uri: str, cache_dir: Path) -> Path:
    """Download an object, or all objects below a prefix, into the cache; returns the path of the copy."""
    bucket, key = split_object_uri(uri)
    with explain_failures(uri):
        etags = _list_etags(bucket, key)
        is_single = key in etags and not key.endswith("/")
        prefix = f"{key.rstrip('/')}/" if key else ""
        names = [key] if is_single else [name for name in etags if name.startswith(prefix) and not name.endswith("/")]
        if not names:
            fail_missing(uri)
        # The ETags are part of the cache's key, so that an old copy is never used after the data was overwritten.
        version = "\n".join([uri, *(f"{name} {etags[name]}" for name in sorted(names))])
        target = cache_dir / hashlib.sha256(version.encode()).hexdigest()[:32]
        if not target.exists():
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache_dir) as staging:
                folder = Path(staging) / "download"
                folder.mkdir()
                if is_single:
                    destinations = [folder / _safe_path(uri, key, key).name]
                else:
                    destinations = [folder / _safe_path(uri, name, name[len(prefix) :]) for name in names]
                _download_objects(bucket, names, destinations)
                if _list_etags(bucket, key) != etags:
                    # The copy could mix files of two versions.
                    raise RetryableError(f"{uri}: changed while it was read; try again when nobody writes there.")
                _publish(folder, target)
        return target / PurePosixPath(key).name if is_single else target


def _list_etags(bucket: str, prefix: str) -> dict[str, str]:
    return {item["Key"]: item["ETag"] for item in s3.list_objects(bucket, prefix)}


def _safe_path(uri: str, name: str, path: str) -> PurePosixPath:
    """The path of an object's copy.

    Raises:
        UserError: The path leads out of the folder for the copies.
    """
    safe = PurePosixPath(path)
    if ".." in safe.parts or safe.is_absolute():
        raise UserError(f"{uri}: the object {name!r} would be stored outside of the folder; rename it.")
    return safe


def _download_objects(bucket: str, names: Sequence[str], destinations: Sequence[Path]) -> None:
    """Download several objects at once, large ones in parts."""
    client, transfer = s3.client(validates_checksums=False), s3.transfer_config(is_parallel=True)

    def download(name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, name, str(path), Config=transfer)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(download, names, destinations):
            pass


def _publish(folder: Path, target: Path) -> None:
    """Rename a finished download into place, unless another process was faster."""
    try:
        folder.rename(target)
    except OSError:
        # The other process's copy is the same and may already be in use, so it stays.
        if not target.exists():
            raise


def read_model_file(uri: str, name: str, cache_dir: Path | None = None) -> bytes:
    """One file of a folder or model at `uri`, without the others; see `fetch`.

    Raises:
        UserError: The URI leads to nothing, the file is missing, or access is denied.
        RetryableError: The store does not answer.
    """
    if is_object_uri(uri):
        require_no_file(uri)
        return read_bytes(join(uri, name))
    if reference := hub_reference(uri):
        repo, revision = reference
        with _explain_hub_failures(repo):
            from huggingface_hub import hf_hub_download, try_to_load_from_cache

            found = try_to_load_from_cache(repo, name, cache_dir, revision)
            if not isinstance(found, str):
                found = hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, etag_timeout=5)
            return Path(found).read_bytes()
    path = local_path(uri)
    require_no_file(uri)
    if path.is_dir() and not (path / name).exists():
        raise UserError(f"{uri}: there is no {name}, so this is not a checkpoint; give its folder.")
    return read_bytes(str(path / name)) if path.is_dir() else fail_missing(uri)


def hub_reference(uri: str) -> tuple[str, str | None] | None:
    """The model's name in the Hugging Face hub and its revision, if any; None for a path or an object."""
    named = uri.startswith("hf://")
    if is_object_uri(uri) or not (named or (_HUB_ID.fullmatch(uri) and not local_path(uri).exists())):
        return None
    repo, _, revision = uri.removeprefix("hf://").partition("@")
    return repo, revision or None


def _fetch_model(name: str, cache_dir: Path | None) -> Path:
    """Download a model from the Hugging Face hub, by `owner/name` or `owner/name@revision`."""
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    with _explain_hub_failures(name):
        return Path(snapshot_download(repo, revision=revision or None, cache_dir=cache_dir))


@contextmanager
def _explain_hub_failures(name: str) -> Iterator[None]:
    """Turn exceptions of the hub's client into one of the two errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: neither a local path nor a model on the hub ({type(error).__name__}); check the spelling, "
            "or set HF_TOKEN if it is gated."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"{name}: the model on the hub lacks a file of a checkpoint; give another.") from error
        if constants.HF_HUB_OFFLINE:
            raise AccessError(
                f"{name}: no such local path, and the hub cannot be reached to look for a model of that name, since "
                f"HF_HUB_OFFLINE is set; unset it, or give a checkpoint's folder; {WITHOUT_HUB}"
            ) from error
        raise RetryableError(
            f"hf://{name}: the hub does not answer ({type(error).__name__}); try again; {WITHOUT_HUB}"
        ) from error
