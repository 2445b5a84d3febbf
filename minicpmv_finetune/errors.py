"""Which failures are the user's to mend and which are worth another try.

A user's mistake ends a command with one sentence and exit code 2, a fault worth retrying with 75, and a bug
keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pydantic import ValidationError

USER_ERROR_EXIT = 2
RETRY_EXIT = 75  # EX_TEMPFAIL of sysexits.h


class _Told(Exception):  # noqa: N818 - what it is called by are the two below
    """One line, whatever was quoted in it: a line break in a name must not look like another message."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.splitlines()))


class UserError(_Told):
    """A mistake only the user can mend; the message is one sentence with place, cause and remedy."""

    exit_code = USER_ERROR_EXIT


class RetryableError(_Told):
    """A fault of the surroundings (storage, tracking server, preemption) that may be gone next time."""

    exit_code = RETRY_EXIT


def first_complaint(error: "ValidationError", whole: str = "") -> str:
    """What pydantic finds wrong first, as `place: reason`; the place is `whole` where it is no single field."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


def end_process(error: UserError | RetryableError) -> NoReturn:
    """Print the one sentence and end the process with the error's exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


@contextmanager
def disk_faults_told() -> Iterator[None]:
    """Turn whatever a library raises when the disk is full, or cannot be written to, into a sentence.

    Raises:
        RetryableError: the disk is full; another attempt may find room.
        UserError: the place can never be written to.
    """
    try:
        yield
    except (UserError, RetryableError):
        raise
    except Exception as error:
        for cause in _chain(error):
            number = cause.errno if isinstance(cause, OSError) else None
            where = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
            if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(cause) for sign in _FULL):
                raise RetryableError(
                    f"{where}no space is left on the disk; give the step a larger volume, or point --out, --cache_dir "
                    "and TMPDIR to one; nothing half-written was left under its final name."
                ) from error
            if number in (errno.EROFS, errno.EACCES):
                raise UserError(f"{where}{os.strerror(number)}; mend the rights, or write elsewhere.") from error
        raise


# Rust's libraries, SQLite, and torch.save, which finds its file shorter than what it wrote, have no errno.
_FULL = ("No space left on device", "database or disk is full", ". unexpected pos ")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
