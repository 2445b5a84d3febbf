"""The client of an S3-compatible store, and the requests that more than one operation sends.

Nothing here translates exceptions: callers wrap requests into `explain_failures`.
"""

import importlib
import os
import random
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from minicpmv_finetune.errors import UserError

from .uris import split_object_uri

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectTypeDef

_PART_BYTES = 16 * 2**20  # size of the parts in which a large object is downloaded at once
_LARGEST_PUT = 2**30  # bytes sent in one request; stores accept up to 5 GB
_WAITS = (0.2, 1.0)  # seconds between attempts to read a response that broke off
_IMPORTING = threading.Lock()


def load_boto3() -> None:
    """Import boto3 in one thread at a time: it is slow and full of circular imports, so others would see half of it."""
    with _IMPORTING:
        for name in ("boto3.session", "boto3.exceptions", "boto3.s3.transfer"):
            importlib.import_module(name)


def is_unparsed_answer(error: AttributeError) -> bool:
    """Whether botocore failed to parse a server's error, as it does where it wants to compare an object's checksum."""
    return "StreamingChecksumBody" in str(error)


def client(validates_checksums: bool = True) -> "S3Client":
    """The client for the current environment and this process; a forked process must not share connections.

    Args:
        validates_checksums: Whether the store's checksums are compared with the received bytes. Not for parts of
            objects: some servers answer a request for a part with the checksum of the whole object.
    """
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    # Threads that send their first requests at once would each make one, which takes longer than the requests.
    with _lock:
        return _make_client(variables, os.getpid(), validates_checksums)


def _renew_lock() -> None:
    """Give a forked process a lock of its own: one that a thread held then would never be released."""
    global _lock
    _lock = threading.Lock()


_lock = threading.Lock()
os.register_at_fork(after_in_child=_renew_lock)


@lru_cache(maxsize=4)
def _make_client(variables: tuple[tuple[str, str], ...], process: int, validates_checksums: bool) -> "S3Client":
    # Not boto3's default session, which keeps the first credentials that it finds.
    load_boto3()
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        # Path-style addresses, which S3-compatible servers without wildcard DNS understand.
        s3={"addressing_style": "path"},
        # A store that is down is reported within seconds; the step as a whole is retried.
        retries={"mode": "standard", "max_attempts": 3},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        response_checksum_validation="when_supported" if validates_checksums else "when_required",
    )
    try:
        return Session().client("s3", config=config)
    except ValueError as error:
        reason = str(error).rstrip(".")
        if "region" in reason:
            raise UserError(f"AWS_DEFAULT_REGION: {reason}; write it like us-east-1.") from error
        raise UserError(f"AWS_ENDPOINT_URL: {reason}; write it as http://host:port.") from error


@lru_cache(maxsize=2)
def transfer_config(is_parallel: bool) -> "TransferConfig":
    """How boto3 transfers a file: in parts by several threads, or in one request by one thread."""
    load_boto3()
    from boto3.s3.transfer import TransferConfig

    part = _PART_BYTES if is_parallel else _LARGEST_PUT
    return TransferConfig(
        multipart_threshold=part, multipart_chunksize=part, max_concurrency=4, use_threads=is_parallel
    )


def list_objects(bucket: str, prefix: str, delimiter: str = "") -> Iterator["ObjectTypeDef"]:
    """The objects whose keys begin with `prefix`; with a delimiter, only those without it in the rest of the key."""
    paginator = client().get_paginator("list_objects_v2")
    if delimiter:
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
    else:
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        yield from page.get("Contents", [])


def read_object(uri: str, span: tuple[int, int] | None = None) -> bytes:
    """An object's bytes, or a part of them: first byte and number of bytes.

    boto3 repeats a request that fails, but not one whose response breaks off, nor one whose answer it cannot parse.
    """
    from botocore.exceptions import ResponseStreamingError

    bucket, key = split_object_uri(uri)
    part = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
    connection = client(validates_checksums=span is None)
    for wait in _WAITS:
        try:
            return connection.get_object(Bucket=bucket, Key=key, **part)["Body"].read()  # type: ignore[arg-type]
        except (ResponseStreamingError, AttributeError) as error:
            if isinstance(error, AttributeError) and not is_unparsed_answer(error):
                raise
            # A random wait, so that workers that were cut off at the same moment do not return at the same moment.
            time.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311
    return connection.get_object(Bucket=bucket, Key=key, **part)["Body"].read()  # type: ignore[arg-type]
