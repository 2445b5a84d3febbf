"""Say how a run ended, and post it to a webhook.

Kubeflow tells the last step of a run only COMPLETE (also after a promotion), RUNNING (a condition was not met: nothing
new, or the gate failed; but also that the run was cancelled or a step killed) or FAILED, with an empty message. What
that means, the steps have left in the store (`run_records`) and in MLflow.

The webhook's address is a secret, since everybody who has it can post: it comes from the environment, and is neither a
parameter nor part of a message. Slack, Mattermost and similar programs display the `text` of the body; the other
fields are for programs.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError, without_password
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.reports.markdown import escape
from minicpmv_finetune.run_records import FailedStep, Outcome, place_of, read_failed_steps
from minicpmv_finetune.run_records import read_outcome as read_stored_outcome
from minicpmv_finetune.tracking.step_runs import read_outcome as read_tracked_outcome

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 10
_UNSAID = "a step ended without a sentence, as one does that is killed for lack of memory; see the run"
_STOPPED = "the run was cancelled, or a step was killed, as for lack of memory; see the run"
# After these outcomes, steps are left out because of a condition; after any other, all steps have run to their end.
_CONDITION_NOT_MET = ("failed the gate", "nothing new")
# What Kubeflow calls the end of a run without a failure.
_SUCCESSES = ("COMPLETE", "RUNNING", "SUCCEEDED")


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        pipeline: Name of the pipeline.
        run: Id of the run.
        state: SUCCEEDED, FAILED, STOPPED (cancelled or killed), or another state as Kubeflow calls it.
        result: "failed", "stopped", or what a run came to, see `run_records.Result`; empty if it is not known.
        step: The step that failed; empty if none did or it is not known.
        outcome: The sentence about it.
        link: Address of the run in the Kubeflow UI; empty if the profile names no UI.
    """

    pipeline: str
    run: str
    state: str
    result: str
    step: str
    outcome: str
    link: str

    @property
    def has_failed(self) -> bool:
        """Whether the run did not do its work."""
        return self.state != "SUCCEEDED"

    @property
    def tracked_status(self) -> str:
        """The status of the run in MLflow."""
        return {"SUCCEEDED": "FINISHED", "STOPPED": "KILLED"}.get(self.state, "FAILED")

    @property
    def text(self) -> str:
        """All of it in one line."""
        state = self.state.lower() + (f" in {self.step}" if self.step else "")
        result = self.result if not self.outcome.startswith(self.result) and not self.has_failed else ""
        said = ": ".join(filter(None, (result, self.outcome.rstrip("."))))
        where = self.link or (f"run {self.run}" if self.run else "")
        return f"{self.pipeline}: {state}" + (f", {said}" if said else "") + (f" ({where})" if where else "")

    @property
    def description(self) -> str:
        """How it ended, for a page that names the run."""
        return f"failed in {self.step}: {self.outcome}" if self.step else self.outcome or self.state.lower()

    def markdown(self) -> str:
        """The same as a page."""
        result = self.result if not self.has_failed and not self.outcome.startswith(self.result) else ""
        title = self.state.capitalize() + (f" in {self.step}" if self.step else f", {result}" if result else "")
        if not self.outcome:
            return f"**{escape(title)}.**\n"
        return f"**{escape(title)}:** {escape(self.outcome.rstrip('.'))}.\n"


def describe_end(pipeline: str, state: str, failure: str = "", output_uri: str = "") -> RunEnd:
    """Find out how the run ended that this step is the last of.

    Args:
        pipeline: Name of the pipeline.
        state: State of the run in Kubeflow: COMPLETE, RUNNING, FAILED …
        failure: Kubeflow's message about a failure, which it leaves empty.
        output_uri: An output of this step; what the other steps have left is found from it.
    """
    failed, outcome = _read_records(output_uri)
    run = environment.PIPELINE_RUN_ID.read()
    base = without_password(environment.KFP_UI_ENDPOINT.read()).rstrip("/")
    link = f"{base}/#/runs/details/{run}" if base and run else ""
    if failed or state not in _SUCCESSES:
        state = "FAILED" if failed else state
        sentence = " ".join(step.sentence for step in failed) or failure or (_UNSAID if state == "FAILED" else "")
        names = ", ".join(step.step for step in failed)
        return RunEnd(pipeline, run, state, "failed" if state == "FAILED" else "", names, sentence, link)
    result, sentence = (outcome.result, outcome.sentence) if outcome else ("", "")
    # Pipelines of 0.1.0 name no output, and leave no outcome.
    if state == "RUNNING" and result not in _CONDITION_NOT_MET and place_of(output_uri)[0]:
        return RunEnd(pipeline, run, "STOPPED", "stopped", "", _STOPPED, link)
    return RunEnd(pipeline, run, "SUCCEEDED", result, "", sentence, link)


def _read_records(output_uri: str) -> tuple[list[FailedStep], Outcome | None]:
    """What the other steps have left: which of them failed, and the outcome; from MLflow where the store is silent."""
    root, own_step = place_of(output_uri)
    failed: list[FailedStep] = []
    outcome: Outcome | None = None
    # Saying less is better than saying nothing.
    with suppress(UserError, RetryableError):
        failed = [step for step in read_failed_steps(root) if step.step != own_step] if root else []
        outcome = read_stored_outcome(root) if root else None
    return failed, outcome or read_tracked_outcome()


def notify(pipeline: str, state: str, failure: str = "") -> bool:
    """Post how a run ended; pipelines that 0.1.0 compiled call this function.

    Args:
        pipeline: Name of the pipeline.
        state: How Kubeflow says that the run ended, such as `SUCCEEDED`.
        failure: Kubeflow's message about a failure, which it leaves empty.

    Returns:
        Whether a webhook is set.

    Raises:
        UserError: The address is invalid, or the webhook refuses the message.
        RetryableError: The webhook does not answer.
    """
    return post(describe_end(pipeline, state, failure))


def post(end: RunEnd) -> bool:
    """Post how a run ended to the webhook.

    Returns:
        Whether a webhook is set.

    Raises:
        UserError: The address is invalid, or the webhook refuses the message.
        RetryableError: The webhook does not answer.
    """
    address = environment.WEBHOOK_URL.read()
    if not address:
        report_outcome(f"{end.text}; nothing is posted, because {environment.WEBHOOK_URL} is not set")
        return False
    if not _is_web_address(address):
        raise _invalid_address()
    fields = ("pipeline", "run", "state", "result", "step", "outcome", "link")
    message = {"text": end.text, **{field: getattr(end, field) for field in fields}}
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
        address, json.dumps(message).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(_ATTEMPTS):
        reason = _post(request)
        if reason is None:
            report_outcome(f"posted: {end.text}")
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
