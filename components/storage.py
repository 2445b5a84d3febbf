"""Files and folders by URI: local paths, `s3://` (any S3-compatible server) and `hf://` for base models.

Two promises hold everywhere: nothing half-written is visible under a final name (`staged_folder`,
`write_bytes`), and a failure says which URI, why, and what to do. Credentials and the endpoint come from the
environment as boto3 reads it (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, a pod's role).
`minio://` is how Kubeflow Pipelines spells its built-in object store and means the same as `s3://`.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from .errors import RetryableError, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_OBJECT_SCHEMES = ("s3://", "minio://")
_REFUSED_SCHEMES = {
    "http://": "data must not change under a run, so plain web addresses are refused; copy it to a folder or s3://",
    "https://": "data must not change under a run, so plain web addresses are refused; copy it to a folder or s3://",
    "gs://": "only local paths, s3:// and hf:// are supported; use the bucket's S3-compatible endpoint",
}


def is_object_uri(uri: str) -> bool:
    """Whether the URI names an object in an S3-compatible store."""
    return uri.startswith(_OBJECT_SCHEMES)


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
    if is_object_uri(reference) or "://" in reference:
        return reference
    if is_object_uri(relative_to) and not reference.startswith("/"):
        return join(relative_to, str(PurePosixPath(reference)))
    return str((Path(relative_to) / reference).absolute())


def exists(uri: str) -> bool:
    """Whether a file lies at `uri`."""
    if not is_object_uri(uri):
        return _local(uri).exists()
    bucket, key = _split(uri)
    with _explained(uri):
        listing = _client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
        return any(item["Key"] == key or item["Key"].startswith(f"{key}/") for item in listing.get("Contents", []))


def read_bytes(uri: str) -> bytes:
    """The whole content of a small file.

    Raises:
        UserError: nothing lies there, or access is denied.
        RetryableError: the store does not answer.
    """
    with _explained(uri):
        if not is_object_uri(uri):
            return _local(uri).read_bytes()
        bucket, key = _split(uri)
        return _client().get_object(Bucket=bucket, Key=key)["Body"].read()


def write_bytes(uri: str, content: bytes) -> None:
    """Write a small file so that a reader sees all of it or none."""
    with _explained(uri):
        if is_object_uri(uri):
            bucket, key = _split(uri)
            _client().put_object(Bucket=bucket, Key=key, Body=content)
            return
        path = _local(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)


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
        return _download(uri, cache_dir or Path(tempfile.gettempdir()) / "minicpmv-finetune")
    if uri.startswith("hf://"):
        return _download_from_hub(uri.removeprefix("hf://"), cache_dir)
    path = _local(uri)
    if path.exists():
        return path
    if not uri.startswith((".", "/")) and uri.count("/") == 1:
        return _download_from_hub(uri, cache_dir)
    return _fail_missing(uri)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a folder's files below an `s3://` URI; the caller writes the commit point (a manifest) last."""
    bucket, prefix = _split(uri)
    with _explained(uri):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            _client().upload_file(str(path), bucket, f"{prefix.rstrip('/')}/{path.relative_to(folder).as_posix()}")


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `final` only when the block ends without an error.

    What stood under `final` is replaced as a whole. The staging folder lies beside it, hidden, so that the last
    step is a rename within one file system.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if final.is_dir():
            shutil.rmtree(final)
        elif final.exists():
            final.unlink()
        staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _local(uri: str) -> Path:
    for scheme, why in _REFUSED_SCHEMES.items():
        if uri.startswith(scheme):
            raise UserError(f"{uri}: {why}.")
    return Path(uri.removeprefix("file://")).expanduser()


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return bucket, key


@lru_cache(maxsize=1)
def _client() -> "S3Client":
    import boto3
    from botocore.config import Config

    # Path-style addresses: what S3-compatible servers without wildcard DNS understand.
    return boto3.client(
        "s3", config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 5})
    )


def _download(uri: str, cache_dir: Path) -> Path:
    """Download an object or all objects below a prefix; a finished folder is renamed into place."""
    bucket, key = _split(uri)
    with _explained(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        objects = [item for page in pages for item in page.get("Contents", [])]
        objects = [item for item in objects if item["Key"] == key or item["Key"].startswith(f"{key.rstrip('/')}/")]
        if not objects:
            _fail_missing(uri)
        # The ETags are part of the cache's key: overwritten data never meets an old copy.
        versions = "".join(sorted(f"{item['Key']}{item['ETag']}" for item in objects))
        target = cache_dir / hashlib.sha256(f"{uri}\n{versions}".encode()).hexdigest()[:32]
        is_single = objects[0]["Key"] == key
        if not target.exists():
            with staged_folder(target) as staging:
                for item in objects:
                    relative = PurePosixPath(key).name if is_single else item["Key"][len(key.rstrip("/")) + 1 :]
                    destination = staging / relative
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    _client().download_file(bucket, item["Key"], str(destination))
        return target / PurePosixPath(key).name if is_single else target


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
            "or log in if it is gated."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise RetryableError(
            f"{name}: no such local path, and the hub does not answer ({type(error).__name__}); give the path of a "
            "checkpoint folder, an s3:// URI, or try again when the hub is reachable."
        ) from error


def _fail_missing(uri: str) -> NoReturn:
    raise UserError(f"{uri}: nothing lies there; check the path or URI.")


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn the storage library's exceptions into the project's two kinds."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        _fail_missing(uri)
    except PermissionError as error:
        raise UserError(f"{uri}: permission denied; check who owns it.") from error
    except NoCredentialsError as error:
        raise UserError(
            f"{uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a "
            "server of your own)."
        ) from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in {"404", "NoSuchKey", "NoSuchBucket"}:
            raise UserError(f"{uri}: nothing lies there ({code}); check bucket and key.") from error
        if code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            raise UserError(f"{uri}: access denied ({code}); check the credentials and the bucket's policy.") from error
        raise RetryableError(f"{uri}: the store answered {code}; try again.") from error
    except BotoCoreError as error:
        raise RetryableError(f"{uri}: the store does not answer ({type(error).__name__}); try again.") from error
