"""Exceptions of the operating system and of boto3, turned into the project's two kinds of error."""

import errno
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minicpmv_finetune.errors import AccessError, RetryableError, UserError, describe_full_disk, is_full_disk

from .s3 import is_unparsed_answer, load_boto3
from .uris import is_object_uri, shorten

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_LISTED_NAMES = 100_000  # in a larger folder, only these are compared with a missing one


@contextmanager
def explain_failures(uri: str) -> Iterator[None]:
    """Turn exceptions about a URI into an error with place, cause and remedy.

    Raises:
        UserError: The file does not exist, access is denied, or the URI is no valid address.
        RetryableError: The file system or the store fails or does not answer.
    """
    load_boto3()
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as botocore

    shown = shorten(uri)
    try:
        yield
    except FileNotFoundError:
        fail_missing(uri)
    except IsADirectoryError as error:
        raise UserError(f"{shown}: is a folder; give a file.") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{shown}: a part of this path is a file, not a folder; check the path.") from error
    except PermissionError as error:
        raise UserError(f"{shown}: permission denied; check who owns it.") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{shown}: invalid path ({error.strerror}); check it.") from error
        if is_full_disk(error):
            raise RetryableError(f"{shown}: {describe_full_disk(error)}") from error
        raise RetryableError(f"{shown}: {error.strerror or error}; try again.") from error
    except botocore.ProfileNotFound as error:
        raise AccessError(
            f"{shown}: {str(error).rstrip('.')}; correct or unset AWS_PROFILE, or add it to AWS's configuration."
        ) from error
    except (botocore.ConfigParseError, botocore.ConfigNotFound) as error:
        raise UserError(f"{shown}: {str(error).rstrip('.')}; correct this file of AWS's configuration.") from error
    except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
        raise AccessError(
            f"{shown}: no S3 credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(and AWS_ENDPOINT_URL for a server of your own)."
        ) from error
    except botocore.ParamValidationError as error:
        raise UserError(f"{shown}: not a valid address of an object; write s3://bucket/key.") from error
    except botocore.ClientError as error:
        _explain_response(shown, error)
    except (botocore.BotoCoreError, Boto3Error) as error:
        response = error.__context__
        if isinstance(response, botocore.ClientError):
            _explain_response(shown, response)
        raise RetryableError(f"{shown}: the store does not answer ({type(error).__name__}); try again.") from error
    except AttributeError as error:
        if not is_unparsed_answer(error):
            raise
        raise RetryableError(f"{shown}: the store answers with an error of its own; try again.") from error


def fail_missing(uri: str) -> NoReturn:
    """Raise the error for a file, object or folder that does not exist."""
    if not is_object_uri(uri) and Path(uri).is_symlink():
        raise UserError(
            f"{shorten(uri)}: is a symbolic link to {shorten(str(Path(uri).readlink()))}, where nothing is; correct it."
        )
    similar = None if is_object_uri(uri) else _similar_name(Path(uri))
    if similar is None:
        raise UserError(f"{shorten(uri)}: not found; check the path or URI.")
    raise UserError(f"{shorten(uri)}: not found; the folder has {similar!a}, so make the two names equal.")


def _similar_name(path: Path) -> str | None:
    """The name of a file that looks like the missing one: blanks, case or the form of accents differ."""
    try:
        return _names_by_look(path.parent, path.parent.stat().st_mtime_ns).get(_look(path.name))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4)
def _names_by_look(folder: Path, written: int) -> dict[str, str]:
    """The names in a folder by what they look like; the time of its last change makes the cache forget old names."""
    with os.scandir(folder) as entries:
        return {_look(entry.name): entry.name for entry in islice(entries, _LISTED_NAMES)}


def _look(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _explain_response(shown: str, error: "ClientError") -> NoReturn:
    """Raise the error that fits the store's HTTP status; error codes differ from server to server."""
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if status == 404:
        raise UserError(f"{shown}: not found ({code}); check bucket and key.") from error
    if status in (408, 429) or status >= 500 or code == "RequestTimeout":
        raise RetryableError(f"{shown}: the store answered {code} ({status}); try again.") from error
    if status in (401, 403):
        raise AccessError(f"{shown}: access denied ({code}); check the credentials and the bucket's policy.") from error
    raise UserError(
        f"{shown}: the store refused the request ({code}, {status}); check URI, region and credentials."
    ) from error
