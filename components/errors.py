"""Which failures are the user's to mend and which are worth another try.

A user's mistake ends a command with one sentence and exit code 2, a fault worth retrying with 75, and a bug
keeps its traceback.
"""

import sys
from typing import NoReturn

USER_ERROR_EXIT = 2
RETRY_EXIT = 75  # EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A mistake only the user can mend; the message is one sentence with place, cause and remedy."""

    exit_code = USER_ERROR_EXIT


class RetryableError(Exception):
    """A fault of the surroundings (storage, tracking server, preemption) that may be gone next time."""

    exit_code = RETRY_EXIT


def end_process(error: UserError | RetryableError) -> NoReturn:
    """Print the one sentence and end the process with the error's exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
