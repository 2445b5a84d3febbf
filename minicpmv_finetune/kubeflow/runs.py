"""What a person wants after submitting: which runs there are, how far one is, what its steps said, and to stop it."""

import re
import sys
import time
from collections.abc import Callable, Iterator
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

OVER = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_FAILURES_IN_A_ROW = 30  # of looking at a run before following it is given up: some minutes of a server being moved
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_AROUND = re.compile(r"-driver$|^condition-\d+$")
_COLOURS = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "red", "CANCELED": "yellow"}


@dataclass(frozen=True)
class RunRow:
    """One run as a list shows it; times in UTC, the duration in seconds."""

    run_id: str
    name: str
    state: str
    created_at: str
    seconds: int | None
    link: str


@dataclass(frozen=True)
class StepRow:
    """One step of a run."""

    step: str
    state: str
    seconds: int | None
    pod: str


def list_runs(cluster: Cluster, experiment: str, most: int) -> list[RunRow]:
    """The newest runs of an experiment, or of the whole namespace if none is named."""
    experiment_id = None
    if experiment:
        experiment_id = cluster.experiment_id(experiment)
        if experiment_id is None:
            return []
    return [_row(cluster, run) for run in islice(cluster.runs(experiment_id), most)]


def find_run(cluster: Cluster, wanted: str) -> kfp_server_api.V2beta1Run:
    """A run with its tasks, by id, or the newest of that name.

    Raises:
        UserError: there is none.
    """
    if _ID.fullmatch(wanted):
        return cluster.run(wanted)
    for run in cluster.runs(name=wanted):
        return cluster.run(run.run_id)
    raise UserError(f"{wanted}: no run has this id or name; see `minicpmv-finetune runs`.")


def steps(run: kfp_server_api.V2beta1Run) -> list[StepRow]:
    """The steps of a run in the order they started, without what Kubeflow puts around them."""
    details = (run.run_details.task_details if run.run_details else None) or []
    known = [task for task in details if task.display_name not in {"root", "root-driver", "executor"}]
    named = [task for task in known if not _AROUND.search(task.display_name or "")]
    named.sort(key=lambda task: task.start_time or task.create_time or datetime.max.replace(tzinfo=UTC))
    return [
        StepRow(task.display_name, task.state or "PENDING", _seconds(task.start_time, task.end_time), _pod(task))
        for task in named
    ]


def follow(
    cluster: Cluster, run_id: str, show: Callable[[kfp_server_api.V2beta1Run], None], timeout: float, poll: float
) -> kfp_server_api.V2beta1Run:
    """Look at a run until it is over; a server that is away meanwhile is waited for.

    Args:
        cluster: where it runs.
        run_id: of the run.
        show: is given the run each time.
        timeout: seconds after which to give up; the run itself goes on.
        poll: seconds between looks.

    Raises:
        UserError: the server no longer lets this user look.
        RetryableError: the time is over, or the server stays away.
    """
    give_up, failures = time.monotonic() + timeout, 0
    while True:
        try:
            run = cluster.run(run_id)
            failures = 0
            show(run)
            if run.state in OVER:
                return run
        except RetryableError:
            failures += 1
            if failures >= _FAILURES_IN_A_ROW:
                raise
        if time.monotonic() >= give_up:
            link = cluster.link(f"runs/details/{run_id}")
            raise RetryableError(f"{run_id}: not over after {timeout:.0f} s, and goes on; look at {link}.")
        time.sleep(min(poll, max(give_up - time.monotonic(), 0)))


def watch(cluster: Cluster, run_id: str, timeout: float, poll: float) -> kfp_server_api.V2beta1Run:
    """Follow a run with a live table on a terminal, or a line for each change elsewhere; on stderr either way."""
    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            return follow(cluster, run_id, lambda run: live.update(_table(run), refresh=True), timeout, poll)
    seen: dict[str, str] = {}

    def tell(run: kfp_server_api.V2beta1Run) -> None:
        for step in steps(run):
            if seen.get(step.step) != step.state:
                seen[step.step] = step.state
                console.print(f"{step.step}: {step.state}")

    return follow(cluster, run_id, tell, timeout, poll)


def outcome(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> str:
    """How a run that is over ended, in a sentence; with what the step that failed said last, where that is known."""
    link = cluster.link(f"runs/details/{run.run_id}")
    if run.state == "SUCCEEDED":
        return f"{run.display_name}: succeeded; {link}"
    failed = [step for step in steps(run) if step.state == "FAILED"]
    if run.state == "FAILED" and failed:
        said = _last_error(cluster, run, failed[0]) or (run.error.message if run.error else "") or "see its log"
        return f"{run.display_name}: failed in {failed[0].step}: {said}; {link}"
    return f"{run.display_name}: {(run.state or 'unknown').lower()}; {link}"


def read_log(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """What a step's container has written so far.

    Raises:
        UserError: the server has no log of it.
    """
    if not step.pod:
        raise UserError(f"{step.step}: has not started, so there is no log; try again once it runs.")
    # The generated services lack this one; it is the address from which Kubeflow's own UI reads.
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
    """Stop a run; whether there was anything to stop."""
    if run.state in OVER or run.state == "CANCELING":
        return False
    if not dry_run:
        cluster.call(cluster.client.runs.run_service_terminate_run, run.run_id)
    return True


def _row(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> RunRow:
    created = run.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S") if run.created_at else ""
    finished = run.finished_at if run.state in OVER else None
    return RunRow(
        run.run_id,
        run.display_name,
        run.state or "PENDING",
        created,
        _seconds(run.created_at, finished),
        cluster.link(f"runs/details/{run.run_id}"),
    )


def _seconds(start: datetime | None, end: datetime | None) -> int | None:
    # A time that has not come is sent as the first second of 1970, or not at all.
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
    for step in steps(run):
        colour = _COLOURS.get(step.state, "")
        table.add_row(step.step, f"[{colour}]{step.state}" if colour else step.state, str(step.seconds or ""))
    return table


def _last_error(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    try:
        lines = read_log(cluster, run, step).splitlines()
    except (UserError, RetryableError):
        return ""
    said: Iterator[str] = (line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: "))
    return next(said, "")
