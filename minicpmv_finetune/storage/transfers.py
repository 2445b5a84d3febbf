"""Copying files and folders to a store, and single files back."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.terminal import print_sentence

from . import s3
from .failures import explain_failures
from .files import read_bytes, write_bytes
from .uris import is_object_uri, join, parent, split_object_uri

_RECORD = TypeAdapter(dict[str, str])
FILES_AT_ONCE = 8  # one connection to a distant store does not use the whole bandwidth
_PIECE_BYTES = 2**20  # read from a connection at a time


def upload_file(path: Path, uri: str) -> None:
    """Copy a file to a store, with checksums, so that a reader sees all of it or none.

    The file is sent in one request by one thread: sending several files at once is faster than sending several parts of
    one file.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    bucket, key = split_object_uri(uri)
    with explain_failures(uri):
        s3.client().upload_file(str(path), bucket, key, Config=s3.transfer_config(is_parallel=False))


@contextmanager
def kept_beside(output_uri: str, output_path: str, name: str) -> Iterator[Path]:
    """A file beside an output of a task, which is no output of its own; it is stored also when the block fails.

    Args:
        output_uri: Where the output will be: a path, or a URI in a store.
        output_path: Local path of the output.
        name: Name of the file.

    Yields:
        Local path of the file, for the block to write.
    """
    path = Path(output_path).with_name(name)
    try:
        yield path
    finally:
        if is_object_uri(output_uri) and path.is_file():
            try:
                upload_file(path, join(parent(output_uri), name))
            except (UserError, RetryableError) as error:
                print_sentence(f"warning: {name} is not stored: {error}")


def upload_folder(folder: Path, uri: str, last: str) -> int:
    """Copy a folder to a store; repeated after an interruption, it sends only the missing files.

    The digests of the sent files are recorded beside the folder, in `NAME.sent.json`, since not every store keeps
    checksums. One file is sent after all others, and is removed first from a folder that is about to change: a reader
    that finds this file finds a complete folder.

    Args:
        folder: Folder to copy, with everything below it; it replaces what an earlier call stored at `uri`.
        uri: URI of the folder in the store.
        last: Name of the file that completes the folder, directly in it.

    Returns:
        Number of files sent.

    Raises:
        UserError: Access is denied, or objects at `uri` were not uploaded by this function, or have changed since.
        RetryableError: The store does not answer.
    """
    stored, sent = _stored_and_sent(uri)
    record = _record(uri)
    bucket, prefix = split_object_uri(f"{uri.rstrip('/')}/")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: file_sha256(path) for name, path in files.items()}
    with explain_failures(uri):
        missing = [
            name
            for name, path in files.items()
            if stored.get(name) != path.stat().st_size or sent.get(name) != digests[name]
        ]
        obsolete = set(stored) - set(files)
        if missing or obsolete:
            # Other files are about to change, so the folder is incomplete until this one is sent again.
            s3.client().delete_object(Bucket=bucket, Key=prefix + last)
            missing = [*(name for name in missing if name != last), last]
            # The record comes before the first object, so that an interrupted upload knows its own.
            sent |= dict.fromkeys(missing, "")
            write_bytes(record, json.dumps(sent).encode())
        for name in obsolete:
            s3.client().delete_object(Bucket=bucket, Key=prefix + name)
        _upload_at_once({name: files[name] for name in missing[:-1]}, uri, digests, sent, record)
        for name in missing[-1:]:
            upload_file(files[name], f"{uri.rstrip('/')}/{name}")
            write_bytes(record, json.dumps(digests).encode())
    return len(missing)


def check_upload(uri: str, beside: str = "") -> None:
    """Refuse a place in a store with objects that no earlier `upload_folder` sent, or that have changed since.

    Args:
        uri: URI of the folder.
        beside: URI of an object that is written together with the folder; it may exist only if an upload did.

    Raises:
        UserError: There are such objects, or access is denied.
        RetryableError: The store does not answer.
    """
    _, sent = _stored_and_sent(uri)
    with explain_failures(beside or uri):
        if beside and not sent and list(s3.list_objects(*split_object_uri(beside))):
            raise UserError(f"{beside}: would be replaced, but was not written by this program; choose another place.")


def _stored_and_sent(uri: str) -> tuple[dict[str, int], dict[str, str]]:
    """The sizes of the objects at a place, and the digests of the files that earlier attempts sent there.

    Raises:
        UserError: There are objects that no attempt sent or that have changed since, or access is denied.
        RetryableError: The store does not answer.
    """
    bucket, prefix = split_object_uri(f"{uri.rstrip('/')}/")
    with explain_failures(uri):
        found = {item["Key"].removeprefix(prefix): item for item in s3.list_objects(bucket, prefix)}
        sent, written = _read_record(_record(uri))
    foreign = set(found) - set(sent)
    if foreign:
        raise UserError(
            f"{uri}: contains objects that were not uploaded by this program, such as {min(foreign)}; choose an empty "
            "place."
        )
    # The record is written after each object, so only an object that somebody else wrote is newer.
    changed = [name for name in found if sent[name] and found[name]["LastModified"] > written]
    if changed:
        raise UserError(
            f"{uri}: contains {min(changed)}, which has changed since this program uploaded it; move it away, or "
            "choose another place."
        )
    return {name: item["Size"] for name, item in found.items()}, sent


def _record(uri: str) -> str:
    return f"{uri.rstrip('/')}.sent.json"


def _read_record(uri: str) -> tuple[dict[str, str], datetime]:
    """The digests of the files that earlier attempts have sent, and when that was noted; empty if there is no record.

    Raises:
        UserError: Another program's object has the record's name.
    """
    bucket, key = split_object_uri(uri)
    written = next((item["LastModified"] for item in s3.list_objects(bucket, key) if item["Key"] == key), None)
    if written is None:
        return {}, datetime.max.replace(tzinfo=UTC)
    try:
        return _RECORD.validate_json(read_bytes(uri)), written
    except ValidationError as error:
        raise UserError(f"{uri}: is not a record of this program; move it away, or choose another place.") from error


def _upload_at_once(
    files: Mapping[str, Path], uri: str, digests: Mapping[str, str], sent: dict[str, str], record: str
) -> None:
    """Send several files at once, and record the digest of each file when it is sent."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        sending = {pool.submit(upload_file, path, f"{uri.rstrip('/')}/{name}"): name for name, path in files.items()}
        for done in as_completed(sending):
            done.result()
            sent[sending[done]] = digests[sending[done]]
            write_bytes(record, json.dumps(sent).encode())


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_file(uri: str, path: Path) -> str:
    """Copy an object to a local file, by one thread.

    Returns:
        The sha256 of the received bytes, for the caller to compare.

    Raises:
        UserError: The object does not exist, or access is denied.
        RetryableError: The store does not answer.
    """
    digest = hashlib.sha256()
    bucket, key = split_object_uri(uri)
    with (
        explain_failures(uri),
        closing(s3.client(validates_checksums=False).get_object(Bucket=bucket, Key=key)["Body"]) as body,
        path.open("wb", buffering=0) as file,
    ):
        for piece in body.iter_chunks(_PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
