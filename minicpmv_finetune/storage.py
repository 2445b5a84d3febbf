"""Files and folders by URI: local paths, `s3://` (any S3-compatible server) and `hf://` for base models.

Two promises hold everywhere: nothing half-written is visible under a final name (`staged_folder`,
`write_bytes`), and a failure says which URI, why, and what to do. Credentials and the endpoint come from the
environment as boto3 reads it (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, a pod's role).
`minio://` is how Kubeflow Pipelines spells its built-in object store and means the same as `s3://`.
"""

import errno
import glob
import hashlib
import importlib
import json
import os
import posixpath
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn, cast

from minicpmv_finetune import environment

from .errors import RetryableError, UserError

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

FILES_AT_ONCE = 8  # a single connection to a store far away does not fill the line
_PART_BYTES = 16 * 2**20  # of a large object whose parts are downloaded at once
_LARGEST_PUT = 2**30  # bytes sent in one request; stores take up to 5 GB
_PIECE_BYTES = 2**20  # read from a connection at a time
_WAITS = (0.2, 1.0)  # seconds between attempts to read an answer that broke off
_OBJECT_SCHEMES = ("s3://", "minio://")
_LOADING = threading.Lock()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class StoredFile(NamedTuple):
    """Size in bytes, and when it was last written."""

    bytes: int
    written: datetime


def is_object_uri(uri: str) -> bool:
    """Whether the URI names an object in an S3-compatible store."""
    return uri.startswith(_OBJECT_SCHEMES)


def is_supported(uri: str) -> bool:
    """Whether files can be read from there: a local path or an S3-compatible store."""
    return is_object_uri(uri) or not _SCHEME.match(uri)


def join(base: str, name: str) -> str:
    """The URI of `name` below the folder `base`."""
    return f"{base.rstrip('/')}/{name}" if is_object_uri(base) else str(Path(base) / name)


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    return uri.rstrip("/").rsplit("/", 1)[0] if is_object_uri(uri) else str(Path(uri).parent)


def resolve(reference: str, relative_to: str) -> str:
    """Make a path found inside a file absolute.

    Args:
        reference: what the file says: a relative or absolute path, or a URI.
        relative_to: URI of the folder that holds the file.

    Returns:
        A URI that means the same from everywhere.
    """
    if _SCHEME.match(reference):
        return reference
    if is_object_uri(relative_to) and not reference.startswith("/"):
        bucket, key = _split(join(relative_to, reference))
        # A store takes `..` for a name.
        return f"{relative_to.partition('://')[0]}://{bucket}/{posixpath.normpath(key)}"
    return str((Path(relative_to) / reference).absolute())


def require_allowed(uri: str) -> str:
    """Refuse an address that data names outside of the places this step may read for it.

    A step reads with its own credentials, so without this whoever writes a data file could have it read anything that
    the step can. `MINICPMV_FINETUNE_ALLOWED_URIS` lists folders, separated by spaces; without it every place is
    allowed.

    Args:
        uri: absolute; links of a local path are followed first.

    Returns:
        The address, unchanged.

    Raises:
        UserError: the address lies below none of the folders.
    """
    allowed = environment.ALLOWED_URIS.read().split()
    if not allowed or "\0" in uri:  # which no file's name holds: whoever reads it says so
        return uri
    place = uri if is_object_uri(uri) else str(Path(uri).resolve())
    if not any(f"{place}/".startswith(f"{folder.rstrip('/')}/") for folder in allowed):
        raise UserError(f"{uri}: lies outside of what this step may read ({', '.join(allowed)}); copy it to there.")
    return uri


def read_bytes(uri: str, span: tuple[int, int] | None = None) -> bytes:
    """The whole content of a small file, or a part of a large one.

    Args:
        uri: local path or object.
        span: first byte and number of bytes of the part.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer.
    """
    if span is not None and span[1] == 0:
        return b""  # no range of HTTP says so
    with _explained(uri):
        if not is_object_uri(uri):
            with _local(uri).open("rb") as file:
                if span is None:
                    return file.read()
                file.seek(span[0])
                return file.read(span[1])
        return _get(uri, span)


def _get(uri: str, span: tuple[int, int] | None) -> bytes:
    """An object's bytes; boto3 repeats a request that fails, but not one whose answer breaks off."""
    from botocore.exceptions import ResponseStreamingError

    bucket, key = _split(uri)
    part = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
    client = _client(compares=span is None)
    for wait in _WAITS:
        try:
            return client.get_object(Bucket=bucket, Key=key, **part)["Body"].read()  # type: ignore[arg-type]
        except ResponseStreamingError:
            # Not all at the same moment, where many workers were cut off at once.
            time.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311
    return client.get_object(Bucket=bucket, Key=key, **part)["Body"].read()  # type: ignore[arg-type]


@contextmanager
def open_stream(uri: str) -> Iterator[BinaryIO]:
    """A file to be read once, from front to end, without holding it in memory or on disk.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer, also while it is read.
    """
    with _explained(uri):
        if is_object_uri(uri):
            bucket, key = _split(uri)
            with closing(_client().get_object(Bucket=bucket, Key=key)["Body"]) as body:
                yield cast("BinaryIO", body)
        else:
            with _local(uri).open("rb") as file:
                yield file


def expand(pattern: str) -> list[str]:
    """The files that a pattern with `*`, `?` or `[…]` matches, sorted; a URI without these is itself.

    Raises:
        UserError: no file matches, or access is denied.
        RetryableError: the store does not answer.
    """
    if not glob.has_magic(pattern) or (not is_object_uri(pattern) and os.path.lexists(pattern)):
        return [pattern]
    with _explained(pattern):
        if is_object_uri(pattern):
            bucket, key = _split(pattern)
            parts = key.split("/")
            fixed = re.split(r"[*?[]", key, maxsplit=1)[0]
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=fixed)
            names = [item["Key"].split("/") for page in pages for item in page.get("Contents", [])]
            found = [
                f"{pattern.partition('://')[0]}://{bucket}/{'/'.join(name)}"
                for name in names
                if len(name) == len(parts) and name[-1] and all(map(fnmatchcase, name, parts))
            ]
        else:
            matches = glob.glob(str(_local(pattern)))  # noqa: PTH207  (Path.glob takes no absolute pattern)
            found = [name for name in matches if Path(name).is_file()]
    if not found:
        raise UserError(f"{_shortened(pattern)}: no file matches this pattern; check it.")
    return sorted(found)


def write_bytes(uri: str, content: bytes) -> None:
    """Write a small file so that a reader sees all of it or none.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if is_object_uri(uri):
            bucket, key = _split(uri)
            _client().put_object(Bucket=bucket, Key=key, Body=content)
            return
        path = _local(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def size(uri: str) -> int:
    """Number of bytes of a file.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if not is_object_uri(uri):
            return _local(uri).stat().st_size
        bucket, key = _split(uri)
        return int(_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def list_files(uri: str) -> dict[str, int]:
    """Names of the files directly in a folder with their sizes in bytes; empty when there is no such folder.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if not is_object_uri(uri):
            folder = _local(uri)
            if not folder.is_dir():
                return {}
            return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        bucket, key = _split(uri)
        prefix = f"{key.rstrip('/')}/"
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        return {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", [])}


def remove_file(uri: str) -> None:
    """Delete a file or an object; nothing happens when there is none.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if is_object_uri(uri):
            bucket, key = _split(uri)
            _client().delete_object(Bucket=bucket, Key=key)
        else:
            _local(uri).unlink(missing_ok=True)


def walk(uri: str) -> dict[str, StoredFile]:
    """All files below a folder by their path in it; empty when there is no such folder.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if not is_object_uri(uri):
            folder = _local(uri)
            paths = [path for path in folder.rglob("*") if path.is_file()]
            states = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
            return {
                name: StoredFile(state.st_size, datetime.fromtimestamp(state.st_mtime, UTC))
                for name, state in states.items()
            }
        bucket, key = _split(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {
            item["Key"].removeprefix(prefix): StoredFile(item["Size"], item["LastModified"])
            for page in pages
            for item in page.get("Contents", [])
        }


def upload_file(path: Path, uri: str) -> None:
    """Copy a file to a store, with checksums, so that a reader sees all of it or none.

    One request, sent by one thread: several files at once are faster than parts of one.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    bucket, key = _split(uri)
    with _explained(uri):
        _client().upload_file(str(path), bucket, key, Config=_transfer(is_parallel=False))


def upload_folder(folder: Path, uri: str, last: str) -> int:
    """Copy a folder to a store; given again after it was cut off, it sends only what is not there yet.

    What was sent is written down beside the folder, in `NAME.sent.json`, since not every store keeps checksums. One
    file is sent when all others are there, and is removed first from a folder that is to change: whoever finds that
    file finds a whole folder.

    Args:
        folder: is copied with all below it, and takes the place of whatever lies at `uri`.
        uri: of the folder in the store.
        last: name of the file that makes the folder complete, directly in it.

    Returns:
        Number of files sent.

    Raises:
        UserError: access is denied.
        RetryableError: the store does not answer.
    """
    record = f"{uri.rstrip('/')}.sent.json"
    bucket, prefix = _split(f"{uri.rstrip('/')}/")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: file_sha256(path) for name, path in files.items()}
    with _explained(uri):
        client = _client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        there = {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", [])}
        try:
            sent: dict[str, str] = json.loads(read_bytes(record))
        except (UserError, ValueError):
            sent = {}
        missing = [
            name
            for name, path in files.items()
            if there.get(name) != path.stat().st_size or sent.get(name) != digests[name]
        ]
        foreign = set(there) - set(files)
        if missing or foreign:
            # Others are about to change, so the folder is not whole until this one is sent again.
            client.delete_object(Bucket=bucket, Key=prefix + last)
            missing = [*(name for name in missing if name != last), last]
        for name in foreign:
            client.delete_object(Bucket=bucket, Key=prefix + name)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            sending = {
                pool.submit(upload_file, files[name], f"{uri.rstrip('/')}/{name}"): name for name in missing[:-1]
            }
            for done in as_completed(sending):
                done.result()
                sent[sending[done]] = digests[sending[done]]
                write_bytes(record, json.dumps(sent).encode())
        for name in missing[-1:]:
            upload_file(files[name], f"{uri.rstrip('/')}/{name}")
            write_bytes(record, json.dumps(digests).encode())
    return len(missing)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_file(uri: str, path: Path) -> str:
    """Copy an object here, by one thread.

    Returns:
        The sha256 of what came, for the caller to compare.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer.
    """
    digest = hashlib.sha256()
    bucket, key = _split(uri)
    with (
        _explained(uri),
        closing(_client(compares=False).get_object(Bucket=bucket, Key=key)["Body"]) as body,
        path.open("wb", buffering=0) as file,
    ):
        for piece in body.iter_chunks(_PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where downloads go: the given folder, or this user's own among the temporary ones."""
    return cache_dir or Path(tempfile.gettempdir()) / f"minicpmv-finetune-{os.getuid()}"


def fetch(uri: str, cache_dir: Path | None = None) -> Path:
    """A local path that holds what lies at `uri`, downloaded if need be.

    Args:
        uri: a local path, `s3://…` (an object or a folder), `hf://owner/name[@revision]` or a bare hub id `owner/name`.
        cache_dir: where downloads go; by default the hub's cache and a temporary folder.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer.
    """
    if is_object_uri(uri):
        return _download(uri, cache_folder(cache_dir))
    if uri.startswith("hf://"):
        return _download_from_hub(uri.removeprefix("hf://"), cache_dir)
    path = _local(uri)
    with _explained(uri):
        if path.exists():
            return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.@-]+", uri):
        try:
            return _download_from_hub(uri, cache_dir)
        except RetryableError as error:
            # More likely a mistyped path than a hub that is down.
            raise UserError(
                f"{uri}: no such local path, and the hub cannot be asked for a model of that name; give a checkpoint's "
                f"folder, an s3:// URI, or hf://{uri} to wait for the hub."
            ) from error
    return _fail_missing(uri)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `final` only when the block ends without an error.

    What stood under `final` is replaced as a whole. The staging folder lies beside it, hidden, so that the last
    step is a rename within one file system.

    Raises:
        UserError: no folder can be made there.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise UserError(f"{final}: cannot be written ({error.strerror}); choose another folder.") from error
    staging.chmod(0o755)
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                file.chmod(file.stat().st_mode | 0o044)  # safetensors leaves its files to their owner alone
        if final.exists():
            # Renamed first and deleted last, so that nobody meets a half-deleted folder under the final name.
            outgoing = final.rename(staging.with_name(f"{staging.name}.replaced"))
            staging.rename(final)
            if outgoing.is_dir():
                shutil.rmtree(outgoing, ignore_errors=True)
            else:
                outgoing.unlink()
        else:
            staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _local(uri: str) -> Path:
    scheme = _SCHEME.match(uri)
    if scheme:
        why = "only local paths, s3:// and, for base models, hf:// are supported"
        if scheme[1].lower() in ("http", "https"):
            why = "data must not change under a run, so plain web addresses are refused"
        raise UserError(f"{_shortened(uri)}: {why}; copy it to a folder or to s3://.")
    if "\0" in uri:
        raise UserError(f"{uri!r}: a path cannot hold a null character; correct it.")
    try:
        return Path(uri).expanduser()
    except RuntimeError:
        raise UserError(f"{_shortened(uri)}: there is no such home directory; write the path in full.") from None


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return bucket, key


def _client(compares: bool = True) -> "S3Client":
    """The client for what the environment says now, of this process: a forked one must not share connections.

    Args:
        compares: the server's checksums with what came. Not of parts: some servers answer the whole object's to
            whoever asks for one.
    """
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _client_for(environment, os.getpid(), compares)


def _load_boto3() -> None:
    """Import the library, slow and full of circles, in one thread at a time; others would see it half imported."""
    with _LOADING:
        for name in ("boto3.session", "boto3.exceptions", "boto3.s3.transfer"):
            importlib.import_module(name)


@lru_cache(maxsize=4)
def _client_for(environment: tuple[tuple[str, str], ...], process: int, compares: bool) -> "S3Client":
    # A session of its own: boto3's default one keeps the first credentials it has seen.
    _load_boto3()
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        # Path-style addresses: what S3-compatible servers without wildcard DNS understand.
        s3={"addressing_style": "path"},
        # A store that is down is told within seconds; the step as a whole is retried.
        retries={"mode": "standard", "max_attempts": 3},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        response_checksum_validation="when_supported" if compares else "when_required",
    )
    try:
        return Session().client("s3", config=config)
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL: {error}; write it as http://host:port.") from error


def _download(uri: str, cache_dir: Path) -> Path:
    """Download an object, or all objects below a prefix, and rename the finished folder into place."""
    bucket, key = _split(uri)
    with _explained(uri):
        etags = _etags(bucket, key)
        is_single = key in etags and not key.endswith("/")
        prefix = f"{key.rstrip('/')}/" if key else ""
        names = [key] if is_single else [name for name in etags if name.startswith(prefix) and not name.endswith("/")]
        if not names:
            _fail_missing(uri)
        # The ETags are part of the cache's key: overwritten data never meets an old copy.
        version = "\n".join([uri, *(f"{name} {etags[name]}" for name in sorted(names))])
        target = cache_dir / hashlib.sha256(version.encode()).hexdigest()[:32]
        if not target.exists():
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache_dir) as staging:
                folder = Path(staging) / "download"
                folder.mkdir()
                destinations = []
                for name in names:
                    relative = PurePosixPath(name if is_single else name[len(prefix) :])
                    if ".." in relative.parts or relative.is_absolute():
                        raise UserError(f"{uri}: the object {name!r} would leave the folder; rename it.")
                    destinations.append(folder / (relative.name if is_single else relative))
                    destinations[-1].parent.mkdir(parents=True, exist_ok=True)
                client, transfer = _client(compares=False), _transfer(is_parallel=True)
                with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                    for _ in pool.map(
                        lambda name, path: client.download_file(bucket, name, str(path), Config=transfer),
                        names,
                        destinations,
                    ):
                        pass
                if _etags(bucket, key) != etags:
                    # Files of two versions would pass for one.
                    raise RetryableError(f"{uri}: changed while it was read; try again when nobody writes there.")
                try:
                    folder.rename(target)
                except OSError:
                    # Another process was faster, and may be reading: its copy is the same, and stays.
                    if not target.exists():
                        raise
        return target / PurePosixPath(key).name if is_single else target


def _etags(bucket: str, prefix: str) -> dict[str, str]:
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}


@lru_cache(maxsize=2)
def _transfer(is_parallel: bool) -> "TransferConfig":
    _load_boto3()
    from boto3.s3.transfer import TransferConfig

    part = _PART_BYTES if is_parallel else _LARGEST_PUT
    return TransferConfig(
        multipart_threshold=part, multipart_chunksize=part, max_concurrency=4, use_threads=is_parallel
    )


def _download_from_hub(name: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, cache_dir=cache_dir))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: neither a local path nor a model on the hub ({type(error).__name__}); check the spelling, "
            "or set HF_TOKEN if it is gated."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise RetryableError(f"hf://{name}: the hub does not answer ({type(error).__name__}); try again.") from error


def _fail_missing(uri: str) -> NoReturn:
    raise UserError(f"{_shortened(uri)}: nothing lies there; check the path or URI.")


def _shortened(uri: str) -> str:
    shown = uri if uri.isprintable() else repr(uri)  # an address with a line break would look like two log lines
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn the system's and the storage library's exceptions into the project's two kinds."""
    _load_boto3()
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as botocore

    shown = _shortened(uri)
    try:
        yield
    except FileNotFoundError:
        _fail_missing(uri)
    except IsADirectoryError as error:
        raise UserError(f"{shown}: is a folder; give a file.") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{shown}: a part of this path is a file, not a folder; check the path.") from error
    except PermissionError as error:
        raise UserError(f"{shown}: permission denied; check who owns it.") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{shown}: no path can be like this ({error.strerror}); check it.") from error
        raise RetryableError(f"{shown}: {error.strerror or error}; try again.") from error
    except (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.ProfileNotFound) as error:
        raise UserError(
            f"{shown}: no S3 credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(and AWS_ENDPOINT_URL for a server of your own)."
        ) from error
    except botocore.ParamValidationError as error:
        raise UserError(f"{shown}: no valid address of an object; write s3://bucket/key.") from error
    except botocore.ClientError as error:
        _explain_answer(shown, error)
    except (botocore.BotoCoreError, Boto3Error) as error:
        answer = error.__context__
        if isinstance(answer, botocore.ClientError):
            _explain_answer(shown, answer)
        raise RetryableError(f"{shown}: the store does not answer ({type(error).__name__}); try again.") from error


def _explain_answer(shown: str, error: "ClientError") -> NoReturn:
    """What the store's answer means to the user, by its HTTP status: codes differ from server to server."""
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if status == 404:
        raise UserError(f"{shown}: nothing lies there ({code}); check bucket and key.") from error
    if status in (408, 429) or status >= 500 or code == "RequestTimeout":
        raise RetryableError(f"{shown}: the store answered {code} ({status}); try again.") from error
    if status in (401, 403):
        raise UserError(f"{shown}: access denied ({code}); check the credentials and the bucket's policy.") from error
    raise UserError(f"{shown}: the store refused ({code}, {status}); check URI, region and credentials.") from error
