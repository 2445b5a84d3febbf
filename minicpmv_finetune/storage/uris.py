"""URIs as text: what kind of place they name, and how they are joined, resolved and checked."""

import posixpath
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

_OBJECT_SCHEMES = ("s3://", "minio://")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LONGEST_SHOWN = 200  # characters of a URI in an error message
# Bytes that Linux and its common file systems allow.
_LONGEST_PATH = 4095
_LONGEST_NAME = 255  # in a folder


def is_object_uri(uri: str) -> bool:
    """Whether the URI names an object in an S3-compatible store."""
    return uri.startswith(_OBJECT_SCHEMES)


def is_supported(uri: str) -> bool:
    """Whether files can be read from the URI: it is a local path or names an object in an S3-compatible store."""
    return is_object_uri(uri) or not _SCHEME.match(uri)


def join(base: str, name: str) -> str:
    """The URI of `name` below the folder `base`."""
    return f"{base.rstrip('/')}/{name}" if is_object_uri(base) else str(Path(base) / name)


@lru_cache
def parent(uri: str) -> str:
    """The folder that contains `uri`."""
    return uri.rstrip("/").rsplit("/", 1)[0] if is_object_uri(uri) else str(Path(uri).parent)


def resolve(reference: str, relative_to: str) -> str:
    """Make a path that was found inside a file absolute.

    Args:
        reference: The path as the file contains it: a relative or absolute path, or a URI.
        relative_to: URI of the folder that contains the file.

    Returns:
        A URI that means the same from everywhere.
    """
    if _SCHEME.match(reference):
        return reference
    if is_object_uri(relative_to) and not reference.startswith("/"):
        bucket, key = split_object_uri(join(relative_to, reference))
        # To a store `..` is an ordinary name.
        return f"{relative_to.partition('://')[0]}://{bucket}/{posixpath.normpath(key)}"
    return str((Path(relative_to) / reference).absolute())


def require_allowed(uri: str) -> str:
    """Refuse a URI from the data that is outside of the folders that this step may read.

    A step reads with its own credentials. Without this check, the author of a data file could make the step read
    everything that its credentials give access to. `MINICPMV_FINETUNE_ALLOWED_URIS` lists the allowed folders,
    separated by spaces; if it is not set, every place is allowed.

    Args:
        uri: Absolute URI; symbolic links of a local path, and of the folders, are followed before the check.

    Returns:
        The URI, unchanged.

    Raises:
        UserError: The URI is below none of the allowed folders.
    """
    allowed = environment.ALLOWED_URIS.read().split()
    if not allowed or "\0" in uri:  # no file's name contains a null character: reading it reports the mistake
        return uri
    place = uri if is_object_uri(uri) else str(real_path(uri))
    folders = [folder if is_object_uri(folder) else str(real_path(folder)) for folder in allowed]
    if not any(f"{place}/".startswith(f"{folder.rstrip('/')}/") for folder in folders):
        raise UserError(
            f"{uri}: outside of the folders that this step may read ({', '.join(allowed)}); copy it into one of them."
        )
    return uri


def split_object_uri(uri: str) -> tuple[str, str]:
    """The bucket and the key of an object."""
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return bucket, key


def local_path(uri: str) -> Path:
    """The path that a URI without a scheme names.

    Raises:
        UserError: The URI has a scheme that is not supported, or is no valid path.
    """
    scheme = _SCHEME.match(uri)
    if scheme:
        why = "only local paths, s3:// and, for base models, hf:// are supported"
        if scheme[1].lower() in ("http", "https"):
            why = "data must not change during a run, so plain web addresses are refused"
        raise UserError(f"{shorten(uri)}: {why}; copy it to a folder or to s3://.")
    if "\0" in uri:
        raise UserError(f"{uri!r}: a path cannot contain a null character; correct it.")
    try:
        content = uri.encode()
    except UnicodeEncodeError:
        raise UserError(f"{uri!a:.200}: this path is not UTF-8 text, so no file can name it; rename it.") from None
    if len(content) > _LONGEST_PATH or max(map(len, content.split(b"/"))) > _LONGEST_NAME:
        raise UserError(
            f"{shorten(uri)}: longer than a path can be; check it, or write the content of an image as "
            "data:image/png;base64,…"
        )
    try:
        return Path(uri).expanduser()
    except RuntimeError:
        raise UserError(f"{shorten(uri)}: there is no such home directory; write the path in full.") from None


def real_path(uri: str) -> Path:
    """The path that a URI without a scheme names, with symbolic links followed.

    Raises:
        UserError: The URI has a scheme that is not supported, or is no valid path, or its links lead in a circle.
    """
    try:
        return local_path(uri).resolve()
    except RuntimeError:
        raise UserError(f"{shorten(uri)}: its symbolic links lead in a circle; correct them.") from None


def shorten(uri: str) -> str:
    """A URI as error messages quote it: on one line and not too long."""
    is_plain = uri.isprintable() and uri == uri.strip()  # a URI with a line break would look like two log lines
    shown = uri if is_plain else repr(uri)
    if not unicodedata.is_normalized("NFC", uri):  # looks like another name, which is written with other characters
        shown = ascii(uri)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"
