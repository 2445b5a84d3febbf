"""The result of a check before a run, and how one is made from a function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minicpmv_finetune.errors import RETRY_EXIT, USER_ERROR_EXIT, RetryableError, UserError, without_password

State = Literal["ok", "skipped", "failed", "unreachable"]
_MARKS = {"ok": "ok     ", "skipped": "skipped", "failed": "FAILED ", "unreachable": "FAILED "}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: `failed` must be fixed by somebody, `unreachable` may be gone at the next attempt, and `skipped` means
            that the check is not possible from here.
        detail: What was found, or the remedy.
    """

    name: str
    state: State
    detail: str

    def line(self) -> str:
        """The result in one line of text."""
        return f"{_MARKS[self.state]} {self.name}: {self.detail}"


class SkippedError(Exception):
    """The check is not possible from here; the message is the reason."""


def run_check(name: str, check: Callable[..., str], *arguments: Any) -> Check:
    """Call a function that returns what it found, and record what it raises."""
    try:
        return Check(name, "ok", without_password(check(*arguments)))
    except SkippedError as error:
        return Check(name, "skipped", without_password(str(error)))
    except UserError as error:
        return Check(name, "failed", str(error))
    except RetryableError as error:
        return Check(name, "unreachable", str(error))


def exit_code(checks: Sequence[Check]) -> int:
    """The exit code of the command: 0 if no check failed, 2 if something must be fixed, else 75."""
    states = {check.state for check in checks}
    if "failed" in states:
        return USER_ERROR_EXIT
    return RETRY_EXIT if "unreachable" in states else 0
