"""Post a run's outcome to a webhook.

The address is a secret, since whoever knows it can post: it comes from the environment, and is neither a parameter
nor in any message. The body's `text` is what Slack, Mattermost and their like show; the rest is for programs.
"""

import json
import time
import urllib.error
import urllib.request

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.tracking.step_runs import read_outcome

_ATTEMPTS = 3
_SECONDS = 10  # to wait for an answer


def notify(pipeline: str, state: str, failure: str = "") -> bool:
    """Tell how a run went.

    Args:
        pipeline: its name.
        state: Kubeflow's: SUCCEEDED, FAILED, CANCELLED …
        failure: what Kubeflow says of a failure.

    Returns:
        Whether there is anyone to tell.

    Raises:
        UserError: the address is none, or is refused.
        RetryableError: nobody answers there.
    """
    address = environment.WEBHOOK_URL.read()
    if not address:
        report_outcome(f"{state.lower()}; nobody is told, since {environment.WEBHOOK_URL} is not set")
        return False
    if not address.startswith(("https://", "http://")):
        raise UserError(f"{environment.WEBHOOK_URL}: not a web address; set it to one that begins with https://.")
    run = environment.PIPELINE_RUN_ID.read()
    outcome = read_outcome() if state == "SUCCEEDED" else failure
    text = f"{pipeline}: {state.lower()}" + (f", {outcome}" if outcome else "") + (f" (run {run})" if run else "")
    message = {"text": text, "pipeline": pipeline, "run": run, "state": state, "outcome": outcome}
    request = urllib.request.Request(  # noqa: S310  (checked above)
        address, json.dumps(message).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS):  # noqa: S310
                report_outcome(f"told: {text}")
                return True
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(
                    f"{environment.WEBHOOK_URL}: the webhook answered {error.code}; check its address."
                ) from None
            reason = str(error.code)
        except (OSError, ValueError) as error:
            # Not the error's own words, which may quote the address.
            reason = type(error).__name__
        if attempt < _ATTEMPTS - 1:
            time.sleep(2**attempt)
    raise RetryableError(f"{environment.WEBHOOK_URL}: the webhook does not answer ({reason}); try again.")
