"""The two kinds of failure that end a command: the user's mistakes, and temporary faults that are worth a retry.

A user's mistake ends a command with one sentence and exit code 2, a temporary fault with one sentence and exit code
75. A bug keeps its traceback.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from .terminal import print_sentence

if TYPE_CHECKING:
    from pydantic import ValidationError

USER_ERROR_EXIT = 2
RETRY_EXIT = 75  # EX_TEMPFAIL of sysexits.h

# Matches passwords without slashes, and those with slashes if the text before the first slash is no host with a port.
# An hf://NAME@REVISION contains no password.
_USER_AND_PASSWORD = re.compile(r"(?<=:)(?<!\bhf:)//(?:[^/\s]*@|[^/\s:@]*:(?!\d+/)[^\s@]*@)")


def without_password(text: str) -> str:
    """The text without the user and password of each address in it.

    The two errors below call this function themselves; other text with addresses needs it before it is printed.
    """
    return _USER_AND_PASSWORD.sub("//", text)


class _OneLineError(Exception):
    """An error whose message is one line: a line break in a quoted name must not look like another message."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(without_password(sentence).splitlines()))


class UserError(_OneLineError):
    """A mistake that only the user can fix; the message is one sentence with place, cause and remedy."""

    exit_code = USER_ERROR_EXIT


class AccessError(UserError):
    """This machine may not read a place that another machine, such as a pod of the cluster, may be allowed to read."""


class MistakesError(UserError):
    """Several mistakes of the user, found at once.

    Attributes:
        sentences: A sentence for each.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        count = f"{len(sentences)} inputs are wrong. " if len(sentences) > 1 else ""
        super().__init__(count + " ".join(sentences))
        self.sentences = tuple(sentences)


class RetryableError(_OneLineError):
    """A fault outside the program (storage, tracking server, preemption) that may be gone at the next attempt."""

    exit_code = RETRY_EXIT


class StoppedError(RetryableError):
    """A signal asked this process to end; a later attempt may go on, but this process must not."""


class SentenceExit(SystemExit):
    """The end of a process with another exit code than those two, whose sentence is already printed.

    Attributes:
        sentence: Why it ends.
    """

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(code)
        self.sentence = sentence


def describe_validation_error(error: "ValidationError", whole: str = "") -> str:
    """The first problem that pydantic found, as `place: reason`; the place is `whole` if it is no single field."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


def first_line(error: Exception) -> str:
    """The beginning of a library's message, for a sentence of our own; the error's class where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end_process(error: UserError | RetryableError) -> NoReturn:
    """Print the error's sentence, or each of its sentences on a line, and end the process with its exit code."""
    text = str(error)
    if isinstance(error, MistakesError) and len(error.sentences) > 1:
        lines = [str(UserError(sentence)) for sentence in error.sentences]
        text = "\n- ".join([f"{len(lines)} inputs are wrong.", *lines])
    print_sentence(f"error: {text}")
    sys.exit(error.exit_code)


@contextmanager
def explain_disk_errors() -> Iterator[None]:
    """Turn any library's exception about a full or unwritable disk into one of the two errors with a sentence.

    Raises:
        RetryableError: The disk is full; another attempt may find room.
        UserError: The place can never be written to.
    """
    try:
        yield
    except (UserError, RetryableError):
        raise
    except Exception as error:
        for cause in _causes(error):
            number = cause.errno if isinstance(cause, OSError) else None
            where = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
            if is_full_disk(cause):
                raise RetryableError(f"{where}{describe_full_disk(cause)}") from error
            if number in (errno.EROFS, errno.EACCES):
                raise UserError(
                    f"{where}{os.strerror(number)}; fix the permissions, or write to another folder."
                ) from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """Whether an exception of any library means that the disk is full."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _DISK_FULL or any(sign in str(error) for sign in _DISK_FULL_SIGNS)


def describe_full_disk(error: BaseException) -> str:
    """The sentence for such an exception, without the place."""
    limit = " (or `ulimit -f` lets no file grow so large)" if "File too large" in str(error) else ""
    return (
        f"no space is left on the disk{limit}; give the step a larger volume, or point --out, --cache_dir and TMPDIR "
        "to one; no incomplete file was left under its final name."
    )


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# These exceptions have no errno: those of Rust libraries, of SQLite, and of torch.save, which finds its file shorter
# than what it wrote.
_DISK_FULL_SIGNS = (
    *("No space left on device", "Disk quota exceeded", "File too large", "database or disk is full"),
    *(". unexpected pos ", "PytorchStreamWriter failed writing"),
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the error that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
