"""Commands for submitted runs: list them, show their steps, follow them to the end, read logs, and stop them."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import kfp_server_api
from rich.console import Console
from rich.live import Live
from rich.table import Table

from minicpmv_finetune.errors import RetryableError, UserError

from .client import Cluster

FINISHED_STATES = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_MAX_FAILURES = 30  # consecutive failed polls, some minutes, which a server needs to move to another node
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Tasks that Kubeflow adds around the steps.
_WRAPPER_NAMES = {"root", "root-driver", "executor"}
_WRAPPER = re.compile(r"-driver$|^condition-\d+$")
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
        link: Address of the run in the UI.
    """

    run_id: str
    name: str
    state: str
    created_at: str
    seconds: int | None
    link: str


@dataclass(frozen=True)
class StepRow:
    """One step of a run.

    Attributes:
        step: Name of the step.
        state: State on the server, such as RUNNING.
        seconds: Duration so far; None if the step has not started.
        pod: Name of the step's pod; empty if it has not started.
    """

    step: str
    state: str
    seconds: int | None
    pod: str


def list_runs(cluster: Cluster, experiment: str, limit: int) -> list[RunRow]:
    """The newest runs of an experiment, or of the whole namespace if `experiment` is empty."""
    experiment_id = None
    if experiment:
        experiment_id = cluster.experiment_id(experiment)
        if experiment_id is None:
            return []
    return [_row(cluster, run) for run in islice(cluster.runs(experiment_id), limit)]


def find_run(cluster: Cluster, id_or_name: str) -> kfp_server_api.V2beta1Run:
    """The run with this id, or the newest run with this name, with its tasks.

    Raises:
        UserError: There is no such run.
    """
    if _ID.fullmatch(id_or_name):
        return cluster.run(id_or_name)
    for run in cluster.runs(name=id_or_name):
        return cluster.run(run.run_id)
    raise UserError(f"{id_or_name}: no run has this id or name; see `minicpmv-finetune runs`.")


def list_steps(run: kfp_server_api.V2beta1Run) -> list[StepRow]:
    """The steps of a run in the order in which they started, without the tasks that Kubeflow adds."""
    details = (run.run_details.task_details if run.run_details else None) or []
    tasks = [
        task
        for task in details
        if task.display_name not in _WRAPPER_NAMES and not _WRAPPER.search(task.display_name or "")
    ]
    tasks.sort(key=lambda task: task.start_time or task.create_time or datetime.max.replace(tzinfo=UTC))
    return [
        StepRow(task.display_name, task.state or "PENDING", _seconds(task.start_time, task.end_time), _pod(task))
        for task in tasks
    ]


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

    Raises:
        UserError: The server no longer accepts the credentials.
        RetryableError: The timeout is over, or the server does not come back.
    """
    deadline, failures = time.monotonic() + timeout, 0
    while True:
        try:
            run = cluster.run(run_id)
            failures = 0
            report(run)
            if run.state in FINISHED_STATES:
                return run
        except RetryableError:
            failures += 1
            if failures >= _MAX_FAILURES:
                raise
        if time.monotonic() >= deadline:
            raise RetryableError(
                f"{run_id}: has not finished after {timeout:.0f} s, and continues; see {cluster.run_link(run_id)}."
            )
        time.sleep(min(poll, max(deadline - time.monotonic(), 0)))


def follow_visibly(cluster: Cluster, run_id: str, timeout: float, poll: float) -> kfp_server_api.V2beta1Run:
    """Follow a run and show its steps on stderr: as a live table on a terminal, else as one line per change."""
    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            return follow(cluster, run_id, lambda run: live.update(_table(run), refresh=True), timeout, poll)
    states: dict[str, str] = {}

    def print_changes(run: kfp_server_api.V2beta1Run) -> None:
        for step in list_steps(run):
            if states.get(step.step) != step.state:
                states[step.step] = step.state
                console.print(f"{step.step}: {step.state}")

    return follow(cluster, run_id, print_changes, timeout, poll)


def describe_outcome(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> str:
    """A sentence about a finished run, with the error message of the step that failed, where it is known."""
    link = cluster.run_link(run.run_id)
    if run.state == "SUCCEEDED":
        return f"{run.display_name}: succeeded; {link}"
    failed = [step for step in list_steps(run) if step.state == "FAILED"]
    if run.state == "FAILED" and failed:
        message = _last_error(cluster, run, failed[0]) or (run.error.message if run.error else "") or "see its log"
        return f"{run.display_name}: failed in {failed[0].step}: {message}; {link}"
    return f"{run.display_name}: {(run.state or 'unknown').lower()}; {link}"


def read_log(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """What a step's container has written so far.

    Raises:
        UserError: The step has not started, or the server has no log for it.
    """
    if not step.pod:
        raise UserError(f"{step.step}: has not started, so there is no log; try again once it runs.")
    # The generated services lack this call; Kubeflow's own UI uses it.
    api = cluster.client.runs.run_service_get_run.__self__.api_client
    answer = cluster.call(
        api.call_api,
        "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log",
        "GET",
        {"run_id": run.run_id, "node_id": step.pod},
        auth_settings=["Bearer"],
        _preload_content=False,
        _return_http_data_only=True,
    )
    return str(answer.data.decode(errors="replace"))


def cancel(cluster: Cluster, run: kfp_server_api.V2beta1Run, dry_run: bool) -> bool:
    """Stop a run; returns False if it has finished or is being stopped already."""
    if run.state in FINISHED_STATES or run.state == "CANCELING":
        return False
    if not dry_run:
        cluster.call(cluster.client.runs.run_service_terminate_run, run.run_id)
    return True


def _row(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> RunRow:
    created = run.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if run.created_at else ""
    finished = run.finished_at if run.state in FINISHED_STATES else None
    return RunRow(
        run.run_id,
        run.display_name,
        run.state or "PENDING",
        created,
        _seconds(run.created_at, finished),
        cluster.run_link(run.run_id),
    )


def _seconds(start: datetime | None, end: datetime | None) -> int | None:
    # The server sends a time that is not known yet as the first second of 1970, or not at all.
    if start is None or start.year <= 1970:
        return None
    ended = end if end and end.year > 1970 else datetime.now(UTC)
    return max(round((ended - start).total_seconds()), 0)


def _pod(task: Any) -> str:
    children = [child.pod_name for child in task.child_tasks or [] if child.pod_name]
    return task.pod_name or (children[-1] if children else "") or ""


def _table(run: kfp_server_api.V2beta1Run) -> Table:
    table = Table(title=f"{run.display_name}: {run.state or 'PENDING'}", title_justify="left", box=None)
    for heading in ("step", "state", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for step in list_steps(run):
        color = _COLORS.get(step.state, "")
        table.add_row(step.step, f"[{color}]{step.state}" if color else step.state, str(step.seconds or ""))
    return table


def _last_error(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """The last error message in a step's log; empty if there is none or no log."""
    try:
        lines = read_log(cluster, run, step).splitlines()
    except (UserError, RetryableError):
        return ""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
