"""Post the outcome of a run to a webhook.

The address is a secret, since everybody who has it can post: it comes from the environment, and is neither a parameter
nor part of a message. Slack, Mattermost and similar programs display the `text` of the body; the other fields are for
programs.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.tracking.step_runs import read_outcome

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 10


def notify(pipeline: str, state: str, failure: str = "") -> bool:
    """Post the outcome of a run.

    Args:
        pipeline: Name of the pipeline.
        state: State of the run in Kubeflow: SUCCEEDED, FAILED, CANCELLED …
        failure: Kubeflow's message about a failure.

    Returns:
        Whether a webhook is set.

    Raises:
        UserError: The address is invalid, or the webhook refuses the message.
        RetryableError: The webhook does not answer.
    """
    address = environment.WEBHOOK_URL.read()
    if not address:
        report_outcome(f"{state.lower()}; nothing is posted, because {environment.WEBHOOK_URL} is not set")
        return False
    if not _is_web_address(address):
        raise _invalid_address()
    run = environment.PIPELINE_RUN_ID.read()
    outcome = read_outcome() if state == "SUCCEEDED" else failure
    text = f"{pipeline}: {state.lower()}" + (f", {outcome}" if outcome else "") + (f" (run {run})" if run else "")
    message = {"text": text, "pipeline": pipeline, "run": run, "state": state, "outcome": outcome}
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        address, json.dumps(message).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(_ATTEMPTS):
        reason = _post(request)
        if reason is None:
            report_outcome(f"posted: {text}")
            return True
        if attempt < _ATTEMPTS - 1:
            time.sleep(2**attempt)
    raise RetryableError(f"{environment.WEBHOOK_URL}: the webhook does not answer ({reason}); try again.")


def _post(request: urllib.request.Request) -> str | None:
    """Send the request once; returns the reason of a failure that a retry may fix, or None.

    No error keeps its cause or its text, because both may contain the address.
    """
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise UserError(
                f"{environment.WEBHOOK_URL}: the webhook answered {error.code}; check its address."
            ) from None
        return str(error.code)
    except http.client.InvalidURL:
        raise _invalid_address() from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(error).__name__


def _is_web_address(address: str) -> bool:
    """Whether the address is one that `urllib.request` can post to, without a user and password."""
    try:
        parts = urllib.parse.urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username and parts.port != 0
    except ValueError:
        return False


def _invalid_address() -> UserError:
    return UserError(
        f"{environment.WEBHOOK_URL}: not a valid web address; set it to one that begins with https:// and has no user "
        "and password."
    )
