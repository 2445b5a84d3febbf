"""Commands for submitted runs: list them, follow them to the end, retry and stop them."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import kfp_server_api
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.terminal import console

from .client import Cluster
from .run_reasons import explained_steps, stopped_workflows, why_waiting, why_without_step
from .run_steps import StepRow, duration, list_steps, waiting_since
from .store import RUN_ID

FINISHED_STATES = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_MAX_FAILURES = 30  # consecutive failed polls, some minutes, which a server needs to move to another node
_PATIENCE_SECONDS = 30  # until a pod that does not start is explained
_COLORS = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "red", "CANCELED": "yellow"}


@dataclass(frozen=True)
class RunRow:
    """One run in a list.

    Attributes:
        run_id: Id of the run.
        name: Name of the run.
        state: State on the server, such as RUNNING.
        created_at: When the run was created, in UTC.
        seconds: Duration so far; None if the run has not started.
        link: Address of the run in the UI; empty if it is not known.
    """

    run_id: str
    name: str
    state: str
    created_at: str
    seconds: int | None
    link: str


def list_runs(cluster: Cluster, experiment: str, limit: int) -> list[RunRow]:
    """The newest runs of an experiment, or of the whole namespace if `experiment` is empty."""
    experiment_id = None
    if experiment:
        experiment_id = cluster.experiment_id(experiment)
        if experiment_id is None:
            return []
    listed = list(islice(cluster.runs(experiment_id), limit))
    stopped = _stopped(cluster, listed)
    return [_row(cluster, run, "CANCELED" if run.run_id in stopped else run.state or "PENDING") for run in listed]


def ended_runs(cluster: Cluster) -> dict[str, str]:
    """How each run of the namespace ended, by its id; those that have not ended are left out."""
    listed = [run for run in cluster.runs() if run.state in FINISHED_STATES]
    stopped = _stopped(cluster, listed)
    return {str(run.run_id): "CANCELED" if run.run_id in stopped else str(run.state) for run in listed}


def find_run(cluster: Cluster, id_or_name: str) -> kfp_server_api.V2beta1Run:
    """The run with this id, or the newest run with this name, with its tasks.

    Args:
        cluster: The server.
        id_or_name: Id or name of the run.

    Raises:
        UserError: There is no such run.
    """
    run_id = id_or_name if RUN_ID.fullmatch(id_or_name) else ""
    run_id = run_id or next((str(run.run_id) for run in cluster.runs(name=id_or_name)), "")
    if not run_id:
        raise UserError(f"{id_or_name}: no run has this id or name; see `minicpmv-finetune runs`.")
    run = cluster.run(run_id)
    if _stopped(cluster, [run]):
        run.state = "CANCELED"
    return run


def follow(
    cluster: Cluster, run_id: str, report: Callable[[kfp_server_api.V2beta1Run], None], timeout: float, poll: float
) -> kfp_server_api.V2beta1Run:
    """Poll a run until it has finished, also while the server is temporarily away.

    Args:
        cluster: The server of the run.
        run_id: Id of the run.
        report: Receives the run after each poll.
        timeout: Seconds until this function stops waiting; the run itself continues.
        poll: Seconds between two polls.

    Returns:
        The run in its last state.

    Raises:
        UserError: The server no longer accepts the credentials.
        RetryableError: The timeout is over, or the server does not come back.
    """
    deadline, failures, was_stopped = time.monotonic() + timeout, 0, False
    while True:
        try:
            run = cluster.run(run_id)
            failures = 0
            was_stopped = was_stopped or run.state == "CANCELING"
            if run.state == "FAILED" and (was_stopped or _stopped(cluster, [run])):
                run.state = "CANCELED"
            report(run)
            if run.state in FINISHED_STATES:
                return run
        except RetryableError:
            failures += 1
            if failures >= _MAX_FAILURES:
                raise
        if time.monotonic() >= deadline:
            raise RetryableError(
                f"{run_id}: has not finished after {timeout:.0f} s, and continues; see {cluster.where(run_id)}."
            )
        time.sleep(min(poll, max(deadline - time.monotonic(), 0)))


def follow_visibly(cluster: Cluster, run_id: str, timeout: float, poll: float) -> kfp_server_api.V2beta1Run:
    """Follow a run and show its steps on stderr: as a live table where it can be redrawn, else as one line per change.

    A step that failed is shown with its reason. Once a pod, or the run itself, has waited for its start for half a
    minute, the reason is printed, because Kubeflow says nowhere that a run waits for something that does not come by
    itself.
    """
    screen = console(sys.stderr)
    reasons = _Reasons(cluster, screen)
    shown: dict[str, tuple[str, int]] = {}

    def print_changes(run: kfp_server_api.V2beta1Run) -> None:
        for step in list_steps(run):
            if shown.get(step.step) != (step.state, step.attempts):
                shown[step.step] = (step.state, step.attempts)
                screen.print(_line(step, reasons.of_failure(run, step)), soft_wrap=True)
        reasons.report_waiting(run)

    try:
        if not screen.is_interactive:
            return follow(cluster, run_id, print_changes, timeout, poll)
        with Live(console=screen, auto_refresh=False) as live:

            def update(run: kfp_server_api.V2beta1Run) -> None:
                live.update(_table(run), refresh=True)
                for step in list_steps(run):
                    reasons.say(f"{step.step}: {why}" if (why := reasons.of_failure(run, step)) else "")
                reasons.report_waiting(run)

            return follow(cluster, run_id, update, timeout, poll)
    except KeyboardInterrupt:
        reasons.say(f"The run continues; see {cluster.where(run_id)}. `minicpmv-finetune cancel` stops it.")
        raise


def _line(step: StepRow, why: str) -> str:
    """A step's state with its attempts if there were several, its duration once it has ended, and why it failed."""
    facts = [step.state]
    has_ended = step.state in FINISHED_STATES
    if step.attempts > 1:
        facts.append(f"{step.attempts} attempts" if has_ended else f"attempt {step.attempts}")
    if has_ended and step.seconds is not None:
        facts.append(f"{step.seconds} s")
    return f"{step.step}: {', '.join(facts)}" + (f": {why}" if why else "")


class _Reasons:
    """Says once for each pod that waits why it does, and why a step failed."""

    def __init__(self, cluster: Cluster, console: Console) -> None:
        self._cluster, self._console = cluster, console
        self._noticed: dict[datetime, float] = {}
        self._said: set[str] = set()
        self._failures: dict[tuple[str, int], str] = {}

    def of_failure(self, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
        """Why a step failed, which is looked up once; empty if it did not."""
        if step.state != "FAILED":
            return ""
        if (key := (step.step, step.attempts)) not in self._failures:
            for found in explained_steps(self._cluster, run):
                self._failures[found.step, found.attempts] = found.message
        return self._failures.get(key, "")

    def say(self, sentence: str) -> None:
        """Print a sentence, unless it is empty or was printed before."""
        if sentence and sentence not in self._said:
            self._said.add(sentence)
            self._console.print(sentence, soft_wrap=not self._console.is_terminal)

    def report_waiting(self, run: kfp_server_api.V2beta1Run) -> None:
        """Say why pods wait, if one has waited for long."""
        since = waiting_since(run)
        if since is None or run.state in FINISHED_STATES:
            return
        # Measured by this machine's clock, because the server's may differ.
        if time.monotonic() - self._noticed.setdefault(since, time.monotonic()) < _PATIENCE_SECONDS:
            return
        for sentence in why_waiting(self._cluster, run):
            self.say(sentence)


def describe_outcome(cluster: Cluster, run: kfp_server_api.V2beta1Run, came_to: str = "") -> str:
    """A sentence about a finished run, with what the step that failed says about it.

    Args:
        cluster: The server of the run.
        run: The run, with its tasks.
        came_to: What a run that did not fail came to, if that is known.
    """
    link = cluster.where(run.run_id)
    if run.state == "FAILED":
        failed = [step for step in explained_steps(cluster, run) if step.state == "FAILED"]
        if failed:
            return f"{run.display_name}: failed in {failed[0].step}: {failed[0].message}; {link}"
        message = why_without_step(cluster, run) or "no step has started"
        return f"{run.display_name}: failed: {message.rstrip('.')}; {link}"
    outcome = "cancelled" if run.state == "CANCELED" else (run.state or "unknown").lower()
    return f"{run.display_name}: {', '.join(filter(None, (outcome, came_to)))}; {link}"


def retry(cluster: Cluster, run: kfp_server_api.V2beta1Run, dry_run: bool) -> None:
    """Start the failed steps of a run again, as *Retry* in the UI does; what has succeeded is not repeated.

    Raises:
        UserError: The run has not failed, or its Workflow is gone from the server.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise UserError(f"{run.display_name}: {run.state}; only a run that failed or was cancelled can be retried.")
    if not dry_run:
        cluster.call(cluster.client.runs.run_service_retry_run, run.run_id)


def cancel(cluster: Cluster, run: kfp_server_api.V2beta1Run, dry_run: bool) -> bool:
    """Stop a run; returns False if it has finished or is being stopped already."""
    if run.state in FINISHED_STATES or run.state == "CANCELING":
        return False
    if not dry_run:
        cluster.call(cluster.client.runs.run_service_terminate_run, run.run_id)
    return True


def _stopped(cluster: Cluster, runs: Sequence[kfp_server_api.V2beta1Run]) -> set[str]:
    """The ids of the runs that somebody stopped, which the server lists as FAILED in the end.

    Their history has the state before, or their Workflow says it, which a stock Kubeflow keeps for an hour.
    """
    failed = {
        str(run.run_id): [status.state for status in run.state_history or []] for run in runs if run.state == "FAILED"
    }
    stopped = {run_id for run_id, history in failed.items() if history[-2:-1] == ["CANCELING"]}
    others = failed.keys() - stopped
    return stopped | (stopped_workflows(cluster, sorted(others)) if others else set())


def _row(cluster: Cluster, run: kfp_server_api.V2beta1Run, state: str) -> RunRow:
    created = run.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if run.created_at else ""
    finished = run.finished_at if run.state in FINISHED_STATES else None
    seconds = duration(run.created_at, finished)
    return RunRow(run.run_id, run.display_name, state, created, seconds, cluster.run_link(run.run_id))


def _table(run: kfp_server_api.V2beta1Run) -> Table:
    table = Table(title=f"{run.display_name}: {run.state or 'PENDING'}", title_justify="left", box=None)
    for heading in ("step", "state", "attempts", "seconds"):
        table.add_column(heading, justify="left" if heading in ("step", "state") else "right")
    for step in list_steps(run):
        color = _COLORS.get(step.state, "")
        table.add_row(step.step, Text(step.state, color), str(step.attempts), str(step.seconds or ""))
    return table
