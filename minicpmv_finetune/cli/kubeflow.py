"""The commands that talk to a cluster: look before, submit, schedule, look after, clean up.

Every one can be given again without harm; `--dry-run` says what would change and changes nothing; `--output json`
prints one JSON document on stdout, and whatever else there is to say goes to stderr.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

from .options import Output

if TYPE_CHECKING:
    from minicpmv_finetune.kubeflow.client import Cluster
    from minicpmv_finetune.kubeflow.profile import Profile

PANEL = "Kubeflow"

app = typer.Typer()
schedule_app = typer.Typer(help="Recurring runs as code: apply, list, pause, resume, delete.", no_args_is_help=True)
app.add_typer(schedule_app, name="schedule", rich_help_panel=PANEL)


class PipelineName(StrEnum):
    """Which pipeline."""

    FINETUNE = "finetune"
    RETRAIN = "retrain"


ProfilePath = Annotated[
    Path,
    typer.Option(
        "--profile", envvar=environment.PROFILE.name, help="Cluster's settings, such as k8s/profiles/dev.yaml."
    ),
]
As = Annotated[Output, typer.Option("--output", help="For a person, or one JSON document for a program.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]
Parameters = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", help="Input of the pipeline as name=value; may be repeated.")
]
ParametersFile = Annotated[Path | None, typer.Option("--parameters", help="YAML file of inputs; -p wins over it.")]
WhichPipeline = Annotated[PipelineName, typer.Option("--pipeline", help="Which pipeline.")]
Experiment = Annotated[str, typer.Option(help="Experiment of Kubeflow Pipelines.")]
RunWord = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, or its name.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")]
File = Annotated[Path, typer.Option("--file", "-f", help="YAML file of schedules; see docs/kubeflow-schedule.md.")]


@app.command(rich_help_panel=PANEL)
def compile(
    output: Annotated[Path, typer.Argument(help="YAML file to write.")] = Path("build/minicpmv-finetune.yaml"),
    partitions: Annotated[
        int, typer.Option(min=1, help="Pods that share the work of preprocess; a profile has its own count.")
    ] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="Cluster's settings to put on every task, such as k8s/profiles/dev.yaml.")
    ] = None,
    objects: Annotated[
        bool, typer.Option("--objects", help="Write Pipeline and PipelineVersion objects for kubectl apply.")
    ] = False,
    pipeline: WhichPipeline = PipelineName.FINETUNE,
    retrain: Annotated[bool, typer.Option("--retrain", hidden=True, help="As --pipeline retrain.")] = False,
) -> None:
    """Write a pipeline as YAML, to be uploaded in the Kubeflow UI or by the kfp SDK."""
    from minicpmv_finetune.kubeflow.compiling import write_objects, write_pipeline
    from minicpmv_finetune.pipelines import pipeline_of

    chosen = pipeline_of("retrain" if retrain else pipeline.value)
    if profile is None:
        if objects:
            raise UserError("--objects: the namespace of the objects is not known; give a --profile too.")
        print(chosen.write(output, partitions))
        return
    if partitions > 1:
        raise UserError(f"--partitions: {profile} decides this; set preprocess_partitions there.")
    print((write_objects if objects else write_pipeline)(chosen, _load(profile), output))


@app.command(rich_help_panel=PANEL)
def preflight(
    profile: Annotated[
        Path | None,
        typer.Option(envvar=environment.PROFILE.name, help="Cluster's settings, such as k8s/profiles/dev.yaml."),
    ] = None,
    data: Annotated[str, typer.Option(help="Training data that a run would read.")] = "",
    base_model: Annotated[str, typer.Option(help="Base checkpoint that a run would read.")] = "",
    image: Annotated[bool, typer.Option("--image", help="Check the container image this runs in instead.")] = False,
    output: As = Output.TEXT,
) -> None:
    """Check everything a run needs, a line each: ok, or what to do. Exits 0 only if all is well."""
    from minicpmv_finetune.kubeflow.preflight import check_cluster, check_image, exit_code

    if image:
        checks = check_image()
    elif profile:
        checks = check_cluster(_load(profile), data, base_model)
    else:
        raise UserError("preflight: nothing to check; give --profile, or --image inside a container.")
    _print([asdict(check) for check in checks], output, lambda: "\n".join(check.line() for check in checks))
    sys.exit(exit_code(checks))


@app.command(rich_help_panel=PANEL)
def submit(
    profile: ProfilePath,
    parameter: Parameters = None,
    parameters: ParametersFile = None,
    name: Annotated[
        str, typer.Option(help="Name of the run; the same name with the same inputs is not run twice.")
    ] = "",
    experiment: Experiment = "minicpmv-finetune",
    pipeline: WhichPipeline = PipelineName.FINETUNE,
    mlflow_experiment: Annotated[str, typer.Option(help="Experiment for Kubeflow's own MLflow plugin.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run, and exit 1 if it fails.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most; the run goes on.")] = 7 * 86400,
    poll: Annotated[float, typer.Option(help="Seconds between looks while waiting.")] = 5,
    dry_run: DryRun = False,
    output: As = Output.TEXT,
) -> None:
    """Start a run: upload the pipeline if its content changed, check the inputs, and print the run's link."""
    from minicpmv_finetune.kubeflow.runs import outcome, watch
    from minicpmv_finetune.kubeflow.submit import Request, pin_base_model, read_parameters
    from minicpmv_finetune.kubeflow.submit import submit as start
    from minicpmv_finetune.pipelines import pipeline_of

    settings = _load(profile)
    chosen = pipeline_of(pipeline.value)
    inputs = pin_base_model(read_parameters(chosen, parameter or [], parameters, settings))
    cluster = _connect(settings)
    done = start(cluster, Request(chosen, inputs, name, experiment, mlflow_experiment), dry_run)
    answer: dict[str, Any] = {**asdict(done), "dry_run": dry_run, "state": None}
    would = "would be " if dry_run else ""

    def text() -> str:
        version = (
            f"pipeline version {done.pipeline_version}: {f'{would}uploaded' if done.uploaded else 'there already'}"
        )
        run = f"run {done.name}: {f'{would}started' if done.started else 'there already'}"
        return "\n".join([version, run, *([done.link] if done.link else [])])

    if not wait or dry_run:
        _print(answer, output, text)
        return
    if output is Output.TEXT:
        print(text(), flush=True)
    run = watch(cluster, done.run_id, timeout, poll)
    _print({**answer, "state": run.state}, output, lambda: outcome(cluster, run))
    sys.exit(0 if run.state in ("SUCCEEDED", "SKIPPED") else 1)


@app.command(rich_help_panel=PANEL)
def runs(
    profile: ProfilePath,
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Id or name of one run, whose steps are shown.")] = "",
    experiment: Annotated[str, typer.Option(help="Experiment to list; empty lists all of the namespace.")] = "",
    most: Annotated[int, typer.Option("--most", min=1, help="How many runs, newest first.")] = 20,
    output: As = Output.TEXT,
) -> None:
    """List the newest runs, or the steps of one."""
    from minicpmv_finetune.kubeflow.runs import find_run, list_runs, steps

    cluster = _connect(_load(profile))
    if run:
        rows = [asdict(step) for step in steps(find_run(cluster, run))]
    else:
        rows = [asdict(row) for row in list_runs(cluster, experiment, most)]
    _print(rows, output, lambda: _table(rows) or "no runs")


@app.command(rich_help_panel=PANEL)
def logs(
    run: RunWord,
    profile: ProfilePath,
    step: Annotated[
        str, typer.Option(help="Step, such as train; by default the one that failed, or the last one.")
    ] = "",
) -> None:
    """Print what a step of a run has written so far."""
    from minicpmv_finetune.kubeflow.runs import find_run, read_log, steps

    cluster = _connect(_load(profile))
    found = find_run(cluster, run)
    started = [item for item in steps(found) if item.pod]
    wanted = [item for item in started if item.step == step] if step else started
    failed = [item for item in wanted if item.state == "FAILED"]
    if not wanted:
        names = ", ".join(item.step for item in started) or "none"
        raise UserError(f"{run}: no step {step or 'of it'} has started; with a log are: {names}.")
    print(read_log(cluster, found, (failed or wanted)[-1]), end="")


@app.command(rich_help_panel=PANEL)
def cancel(run: RunWord, profile: ProfilePath, dry_run: DryRun = False, output: As = Output.TEXT) -> None:
    """Stop a run; one that is over stays as it is."""
    from minicpmv_finetune.kubeflow.runs import cancel as stop
    from minicpmv_finetune.kubeflow.runs import find_run

    cluster = _connect(_load(profile))
    found = find_run(cluster, run)
    changed = stop(cluster, found, dry_run)
    said = (
        ("would be stopped" if dry_run else "is being stopped") if changed else f"is over or stopping ({found.state})"
    )
    answer = {"run_id": found.run_id, "changed": changed, "dry_run": dry_run}
    _print(answer, output, lambda: f"{found.display_name}: {said}")


@app.command(rich_help_panel=PANEL)
def gc(
    profile: ProfilePath,
    root: Annotated[str, typer.Option(help="Folder of run folders; by default the profile's pipeline root.")] = "",
    delete: Annotated[bool, typer.Option("--delete/--dry-run", help="Delete what is listed, or only list it.")] = False,
    min_age_days: Annotated[int, typer.Option(min=0, help="Leave alone what was written to within these days.")] = 7,
    output: As = Output.TEXT,
) -> None:
    """List run folders, shards and checkpoints that no run or registered model refers to; delete them with --delete."""
    from minicpmv_finetune.kubeflow.gc import find_unused, remove

    settings = _load(profile)
    found = find_unused(_connect(settings), root, min_age_days)
    if delete:
        for item in found:
            remove(item)
    verb = "deleted" if delete else "unused"
    lines = [f"{verb} {item.uri} ({item.bytes / 1e9:.2f} GB, last written {item.written})" for item in found]
    total = f"{len(found)} folders, {sum(item.bytes for item in found) / 1e9:.2f} GB {verb}"
    _print([{**asdict(item), "deleted": delete} for item in found], output, lambda: "\n".join([*lines, total]))


@schedule_app.command("apply")
def apply_schedules(file: File, profile: ProfilePath, dry_run: DryRun = False, output: As = Output.TEXT) -> None:
    """Make the server's schedules be what the file says: create, replace if different, leave alone if equal."""
    from minicpmv_finetune.kubeflow.schedule import apply, load_schedules

    cluster = _connect(_load(profile))
    done = apply(cluster, load_schedules(file), dry_run)
    would = "would " if dry_run else ""
    _print(
        [asdict(step) for step in done],
        output,
        lambda: "\n".join(f"{would}{step.verb} {step.name} ({step.why}): {step.when}" for step in done),
    )


@schedule_app.command("list")
def list_schedules(profile: ProfilePath, output: As = Output.TEXT) -> None:
    """List the schedules on the server, their times in words."""
    from minicpmv_finetune.kubeflow.schedule import list_schedules as find

    rows = [asdict(row) for row in find(_connect(_load(profile)))]
    _print(rows, output, lambda: _table(rows) or "no schedules")


@schedule_app.command()
def pause(name: Name, profile: ProfilePath, dry_run: DryRun = False, output: As = Output.TEXT) -> None:
    """Stop a schedule from starting runs, until it is resumed."""
    _switch(name, profile, False, dry_run, output)


@schedule_app.command()
def resume(name: Name, profile: ProfilePath, dry_run: DryRun = False, output: As = Output.TEXT) -> None:
    """Let a paused schedule start runs again."""
    _switch(name, profile, True, dry_run, output)


@schedule_app.command("delete")
def delete_schedules(
    profile: ProfilePath,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the schedule.")] = "",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Delete the schedules of this file.")] = None,
    dry_run: DryRun = False,
    output: As = Output.TEXT,
) -> None:
    """Delete one schedule, or those of a file; runs that they started stay."""
    from minicpmv_finetune.kubeflow.schedule import delete, load_schedules

    if bool(name) == bool(file):
        raise UserError("schedule delete: give either a NAME or -f FILE.")
    cluster = _connect(_load(profile))
    names = [schedule.name for schedule in load_schedules(file)] if file else [name]
    gone = {item: delete(cluster, item, dry_run) for item in names}
    verb = "would be deleted" if dry_run else "deleted"
    _print(gone, output, lambda: "\n".join(f"{item}: {verb if was else 'not there'}" for item, was in gone.items()))


def _switch(name: str, profile: Path, on: bool, dry_run: bool, output: Output) -> None:
    from minicpmv_finetune.kubeflow.schedule import switch

    changed = switch(_connect(_load(profile)), name, on, dry_run)
    state = "resumed" if on else "paused"
    said = (f"would be {state}" if dry_run else state) if changed else f"was {state} already"
    _print({"name": name, "changed": changed, "dry_run": dry_run}, output, lambda: f"{name}: {said}")


def _load(path: Path) -> "Profile":
    from minicpmv_finetune.kubeflow.profile import load_profile

    return load_profile(path)


def _connect(profile: "Profile") -> "Cluster":
    from minicpmv_finetune.kubeflow.client import connect

    return connect(profile)


def _print(answer: Any, output: Output, text: Callable[[], str]) -> None:
    print(json.dumps(answer, indent=1, ensure_ascii=False) if output is Output.JSON else text())


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows under their headings, each column as wide as its widest word."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
