"""Reading, writing and listing files, local ones and objects alike."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from minicpmv_finetune.errors import UserError

from . import s3
from .failures import explain_failures
from .uris import is_object_uri, local_path, parent, shorten, split_object_uri


class StoredFile(NamedTuple):
    """A file's size and age.

    Attributes:
        bytes: Size of the file.
        written: When the file was last written.
    """

    bytes: int
    written: datetime


def read_bytes(uri: str, span: tuple[int, int] | None = None) -> bytes:
    """The whole content of a small file, or a part of a large one.

    Args:
        uri: Local path or object.
        span: First byte and number of bytes of the part.

    Raises:
        UserError: The file does not exist, or access is denied.
        RetryableError: The store does not answer.
    """
    if span is not None and span[1] == 0:
        return b""  # HTTP has no empty range
    with explain_failures(uri):
        if is_object_uri(uri):
            return s3.read_object(uri, span)
        with _regular_file(uri).open("rb") as file:
            if span is None:
                return file.read()
            file.seek(span[0])
            return file.read(span[1])


@contextmanager
def open_stream(uri: str) -> Iterator[BinaryIO]:
    """A file to read once, from start to end, without storing it in memory or on disk.

    Raises:
        UserError: The file does not exist, or access is denied.
        RetryableError: The store does not answer, also later while the stream is read.
    """
    with explain_failures(uri):
        if is_object_uri(uri):
            bucket, key = split_object_uri(uri)
            with closing(s3.client().get_object(Bucket=bucket, Key=key)["Body"]) as body:
                yield cast("BinaryIO", body)
        else:
            with _regular_file(uri).open("rb") as file:
                yield file


def _regular_file(uri: str) -> Path:
    """The path of a local file; a pipe or a device would never end.

    Raises:
        UserError: As the text says.
    """
    path = local_path(uri)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{uri}: is no regular file (a pipe or a device); give a file.")
    return path


def expand(pattern: str) -> list[str]:
    """The files that match a pattern with `*`, `?` or `[…]`, sorted; a URI without these stands for itself.

    A name that exists stands for itself too, also as a folder of the pattern: `run[1]/part-*.jsonl`.

    Raises:
        UserError: No file matches, or access is denied.
        RetryableError: The store does not answer.
    """
    if not glob.has_magic(pattern) or (not is_object_uri(pattern) and os.path.lexists(pattern)):
        return [pattern]
    with explain_failures(pattern):
        if is_object_uri(pattern):
            bucket, key = split_object_uri(pattern)
            parts = key.split("/")
            fixed = re.split(r"[*?[]", key, maxsplit=1)[0]
            keys = [item["Key"] for item in s3.list_objects(bucket, fixed)]
            if key in keys:
                return [pattern]
            found = [
                f"{pattern.partition('://')[0]}://{bucket}/{name}" for name in keys if _matches(name.split("/"), parts)
            ]
        else:
            matches = glob.glob(_with_literal_folders(local_path(pattern)))  # noqa: PTH207  (needs a relative pattern)
            found = [name for name in matches if Path(name).is_file()]
    if not found:
        raise UserError(f"{shorten(pattern)}: no file matches this pattern; check it.")
    return sorted(found)


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether each part of a key equals or matches the same part of the pattern."""
    pairs = zip(name, pattern, strict=False)
    return (
        len(name) == len(pattern) and name[-1] != "" and all(one == two or fnmatchcase(one, two) for one, two in pairs)
    )


def _with_literal_folders(pattern: Path) -> str:
    """The pattern, in which the names of folders that exist are no patterns."""
    folder = next(folder for folder in (*pattern.parents, Path()) if folder.is_dir())
    return str(Path(glob.escape(str(folder))) / pattern.relative_to(folder))


def write_bytes(uri: str, content: bytes) -> None:
    """Write a small file so that a reader sees all of it or none.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if is_object_uri(uri):
            bucket, key = split_object_uri(uri)
            s3.client().put_object(Bucket=bucket, Key=key, Body=content)
            return
        path = local_path(uri)
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
        UserError: The file does not exist, or access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if not is_object_uri(uri):
            return local_path(uri).stat().st_size
        bucket, key = split_object_uri(uri)
        return int(s3.client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def is_folder(uri: str) -> bool:
    """Whether the URI names a folder, or a part of a store that contains objects, and no file.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if not is_object_uri(uri):
            return local_path(uri).is_dir()
        bucket, key = split_object_uri(uri)
        if not key:
            return True
        first = next(s3.list_objects(bucket, key), None)  # keys are sorted: the object itself comes first
        below = f"{key.rstrip('/')}/"
        is_file = first is not None and first["Key"] == key and key != below
        return not is_file and next(s3.list_objects(bucket, below), None) is not None


def require_no_file(uri: str) -> None:
    """Refuse a file where a folder is needed; whether there is a folder is not checked.

    Raises:
        UserError: The URI names a file, or access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if is_object_uri(uri):
            bucket, key = split_object_uri(uri)
            is_file = bool(key) and next((item["Key"] == key for item in s3.list_objects(bucket, key)), False)
        else:
            is_file = local_path(uri).is_file()
    if is_file and not uri.endswith("/"):
        raise UserError(f"{shorten(uri)}: is a file, but a folder is needed; give '{shorten(parent(uri))}'.")


def list_files(uri: str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder; empty if there is no such folder.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if not is_object_uri(uri):
            folder = local_path(uri)
            if not folder.is_dir():
                return {}
            return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        bucket, key = split_object_uri(uri)
        prefix = f"{key.rstrip('/')}/"
        objects = s3.list_objects(bucket, prefix, delimiter="/")
        return {item["Key"].removeprefix(prefix): item["Size"] for item in objects}


def remove_file(uri: str) -> None:
    """Delete a file or an object, if it exists.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if is_object_uri(uri):
            bucket, key = split_object_uri(uri)
            s3.client().delete_object(Bucket=bucket, Key=key)
        else:
            local_path(uri).unlink(missing_ok=True)


def walk(uri: str) -> dict[str, StoredFile]:
    """All files below a folder by their path in it; empty if there is no such folder.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    with explain_failures(uri):
        if not is_object_uri(uri):
            folder = local_path(uri)
            paths = [path for path in folder.rglob("*") if path.is_file()]
            states = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
            return {
                name: StoredFile(state.st_size, datetime.fromtimestamp(state.st_mtime, UTC))
                for name, state in states.items()
            }
        bucket, key = split_object_uri(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        objects = s3.list_objects(bucket, prefix)
        return {item["Key"].removeprefix(prefix): StoredFile(item["Size"], item["LastModified"]) for item in objects}
