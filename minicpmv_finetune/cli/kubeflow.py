"""The commands that talk to a cluster: check it, submit and follow runs, apply schedules, clean up.

Every command can be repeated without harm. `--dry-run` prints what would change and changes nothing. `--output json`
prints one JSON document on stdout; everything else goes to stderr.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.pipelines import PipelineChoice, all_pipelines
from minicpmv_finetune.terminal import print_sentence

from .help import Group
from .options import Output, OutputFormat, not_empty, path_option, recipe_option, text_table

if TYPE_CHECKING:
    import kfp_server_api

    from minicpmv_finetune.kubeflow.client import Cluster
    from minicpmv_finetune.kubeflow.profile import Profile
    from minicpmv_finetune.kubeflow.results import Result
    from minicpmv_finetune.kubeflow.submit import Submission

PANEL = "Kubeflow"

app = typer.Typer()
schedule_app = typer.Typer(cls=Group, help="Recurring runs as code: apply, list, pause, resume, delete.")
app.add_typer(schedule_app, name="schedule", rich_help_panel=PANEL)


_PROFILE_HELP = "Settings of the cluster: kubeflow, kubeflow-profile, or a file such as k8s/profiles/dev.yaml."
ProfileName = Annotated[
    str, typer.Option("--profile", envvar=environment.PROFILE.name, help=_PROFILE_HELP, show_default="kubeflow")
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace", envvar=environment.NAMESPACE.name, help="Namespace of the runs, in place of the profile's."
    ),
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=0, help="GPUs of train, in place of the profile's; 0 uses none in any step.")
]
Registry = Annotated[
    str,
    typer.Option(
        "--registry", help=f"Registry of the container images; without it the profile's, or {environment.REGISTRY}."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")]
Parameters = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", help="Input of the pipeline as name=value; may be repeated.")
]
Recipe = Annotated[str | None, recipe_option()]
PipelineName = Annotated[PipelineChoice, typer.Option("--pipeline", help="Pipeline to use.")]
Experiment = Annotated[str, typer.Option(help="Experiment of Kubeflow Pipelines.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Id or name of the run.")]
ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.")]
SchedulesFile = Annotated[Path, path_option("--file", "YAML file of schedules; see docs/kubeflow-schedule.md.", "-f")]


@app.command(rich_help_panel=PANEL)
def compile(
    output: Annotated[
        Path, typer.Argument(parser=not_empty("OUTPUT"), metavar="OUTPUT", help="YAML file to write.")
    ] = Path("build/minicpmv-finetune.yaml"),
    partitions: Annotated[
        int, typer.Option(min=1, help="Number of pods that share preprocess; a profile of your own contains it.")
    ] = 1,
    profile: ProfileName = "",
    namespace: Namespace = "",
    gpus: Gpus = None,
    registry: Registry = "",
    objects: Annotated[
        bool, typer.Option("--objects", help="Write Pipeline and PipelineVersion objects for kubectl apply.")
    ] = False,
    pipeline: PipelineName = "finetune",
    retrain: Annotated[bool, typer.Option("--retrain", hidden=True, help="The same as --pipeline retrain.")] = False,
) -> None:
    """Write a pipeline as a YAML file for the Kubeflow UI or the kfp SDK."""
    from minicpmv_finetune.kubeflow.compiling import write_objects, write_pipeline
    from minicpmv_finetune.kubeflow.parameters import needs_registry
    from minicpmv_finetune.kubeflow.profile import SHIPPED
    from minicpmv_finetune.pipelines import pipeline_of

    chosen = pipeline_of("retrain" if retrain else pipeline)
    _refuse_other_file(output)
    settings = _load(profile, namespace, gpus, registry)
    if partitions > 1:
        if profile not in ("", *SHIPPED):
            raise UserError(f"--partitions: {profile} contains this setting; set preprocess_partitions there.")
        settings = settings.model_copy(update={"preprocess_partitions": partitions})
    for sentence in needs_registry(chosen, {}) if settings.mlflow is None else ():
        print_sentence(f"warning: {sentence}")
    print((write_objects if objects else write_pipeline)(chosen, settings, output))
    if not objects:
        print(f"\nFor the field Pipeline description, when you upload the file in the UI:\n\n{chosen.guide}")


@app.command(rich_help_panel=PANEL)
def preflight(
    profile: ProfileName = "",
    namespace: Namespace = "",
    gpus: Gpus = None,
    registry: Registry = "",
    data: Annotated[str, typer.Option(help="Training data of the run.")] = "",
    base_model: Annotated[str, typer.Option(help="Base checkpoint of the run.")] = "",
    image: Annotated[
        bool, typer.Option("--image", help="Check the container image that this command runs in instead.")
    ] = False,
    output: OutputFormat = "text",
) -> None:
    """Check everything that a run needs, and print one line per check: ok, or the remedy.

    The exit code is 0 only if no check failed.
    """
    from minicpmv_finetune.kubeflow.checks import exit_code

    if image:
        from minicpmv_finetune.kubeflow.container_checks import check_container

        checks = check_container()
    else:
        from minicpmv_finetune.kubeflow.preflight import check_cluster

        checks = check_cluster(_load(profile, namespace, gpus, registry), data, base_model)
    _print([asdict(check) for check in checks], output, lambda: "\n".join(check.line() for check in checks))
    sys.exit(exit_code(checks))


@app.command(rich_help_panel=PANEL)
def setup(
    profile: ProfileName = "",
    namespace: Namespace = "",
    registry: Registry = "",
    apply: Annotated[bool, typer.Option("--apply", help="Apply MLflow to the namespace, if it has none.")] = False,
    output: OutputFormat = "text",
) -> None:
    """Print what a Kubeflow lacks for a first run, and the settings that the other commands need.

    The exit code is 0 only if nothing is missing.
    """
    from minicpmv_finetune.kubeflow.checks import exit_code
    from minicpmv_finetune.kubeflow.profile import DEFAULT_PROFILE
    from minicpmv_finetune.kubeflow.setup import set_up

    found = set_up(_load(profile, namespace, registry=registry), profile or DEFAULT_PROFILE, apply)
    _print(asdict(found), output, lambda: "\n".join([*(check.line() for check in found.checks), "", *found.settings]))
    sys.exit(exit_code(found.checks))


@app.command(rich_help_panel=PANEL)
def upload(
    data: Annotated[
        list[Path],
        typer.Argument(parser=not_empty("DATA"), metavar="DATA...", help="Data files of this machine."),
    ],
    profile: ProfileName = "",
    namespace: Namespace = "",
    to: Annotated[
        str, typer.Option("--to", help="Folder in the store; by default minicpmv-data below the runs' pipeline root.")
    ] = "",
    outside: Annotated[
        bool, typer.Option("--outside", help="Also copy images that lie outside of the data files' folder.")
    ] = False,
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """Copy data files and their images into the cluster's object store, and print the address of each data file.

    Equal data has an equal address; a repeated command sends only what is missing. Keys and address of the store come
    from AWS_* variables, else from the cluster through the kubeconfig.
    """
    from minicpmv_finetune.kubeflow.store import use_store
    from minicpmv_finetune.kubeflow.upload import describe_upload
    from minicpmv_finetune.kubeflow.upload import upload as copy

    settings = _load(profile, namespace)
    use_store(settings)
    done = copy(data, settings, to, outside, dry_run)
    print_sentence(describe_upload(done, dry_run))
    _print({**asdict(done), "dry_run": dry_run}, output, lambda: "\n".join(done.uris))


@app.command(rich_help_panel=PANEL)
def submit(
    profile: ProfileName = "",
    namespace: Namespace = "",
    gpus: Gpus = None,
    registry: Registry = "",
    parameter: Parameters = None,
    recipe: Recipe = None,
    name: Annotated[
        str, typer.Option(help="Name of the run; a second run with the same name and inputs is not started.")
    ] = "",
    experiment: Experiment = "minicpmv-finetune",
    pipeline: PipelineName = "finetune",
    mlflow_experiment: Annotated[str, typer.Option(help="Experiment for Kubeflow's own MLflow plugin.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run, and exit with 1 if it fails.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Maximum seconds to wait; the run continues afterwards.")] = 7
    * 86400,
    poll: Annotated[float, typer.Option(min=0, help="Seconds between two requests while waiting.")] = 5,
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """Start a run: check the inputs, upload the pipeline if its content changed, and print the run's link."""
    from minicpmv_finetune.inputs.table import defaults
    from minicpmv_finetune.kubeflow.parameters import read_parameters, resolve_parameters
    from minicpmv_finetune.kubeflow.runs import describe_outcome, follow_visibly
    from minicpmv_finetune.kubeflow.submit import Request
    from minicpmv_finetune.kubeflow.submit import submit as start
    from minicpmv_finetune.kubeflow.tracking_server import end_tracked_runs
    from minicpmv_finetune.pipelines import pipeline_of

    settings = _load(profile, namespace, gpus, registry)
    chosen = pipeline_of(pipeline)
    # The defaults too: the UI's comparison of runs shows only what a run was given.
    inputs = {
        **defaults(chosen.inputs),
        **resolve_parameters(chosen, read_parameters(chosen, parameter or [], recipe), settings),
    }
    cluster = _connect(settings)
    submission = start(cluster, Request(chosen, inputs, name, experiment, mlflow_experiment), dry_run)
    answer: dict[str, Any] = {**asdict(submission), "dry_run": dry_run, "state": None, "outcome": None, "result": None}
    text = _describe_submission(submission, dry_run, cluster.where(submission.run_id))
    if not wait or dry_run:
        _print(answer, output, lambda: text)
        return
    if output == "text":
        print(text, flush=True)
    run = follow_visibly(cluster, submission.run_id, timeout, poll)
    if run.state != "SUCCEEDED":
        end_tracked_runs(settings, {submission.run_id: run.state})
    result, came_to = _read_result(cluster, run) if run.state == "SUCCEEDED" else (None, "")
    lines = [describe_outcome(cluster, run, came_to), *(result.lines() if result else [])]
    answer.update(state=run.state, outcome=lines[0], result=asdict(result) if result else None)
    _print(answer, output, lambda: "\n".join(lines))
    sys.exit(0 if run.state in ("SUCCEEDED", "SKIPPED") else 1)


def _read_result(cluster: "Cluster", run: "kfp_server_api.V2beta1Run") -> "tuple[Result | None, str]":
    """The result of a run, else what it came to without one, where the store can be read from here."""
    from minicpmv_finetune.kubeflow.results import read_result, why_without_result

    try:
        result = read_result(cluster, run)
        return result, "" if result else why_without_result(cluster, run)
    except (UserError, RetryableError) as error:
        print_sentence(f"warning: the run's result cannot be read from here: {error}")
        return None, ""


def _describe_submission(submission: "Submission", dry_run: bool, where: str) -> str:
    would = "would be " if dry_run else ""
    uploaded = f"{would}uploaded" if submission.uploaded else "already uploaded"
    started = f"{would}started" if submission.started else "already started"
    lines = [f"pipeline version {submission.pipeline_version}: {uploaded}", f"run {submission.name}: {started}"]
    return "\n".join([*lines, where] if submission.run_id else lines)


@app.command(rich_help_panel=PANEL)
def runs(
    profile: ProfileName = "",
    namespace: Namespace = "",
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Id or name of one run, to list its steps.")] = "",
    experiment: Annotated[str, typer.Option(help="Experiment to list; empty lists the whole namespace.")] = "",
    most: Annotated[int, typer.Option("--most", min=1, help="Maximum number of runs, newest first.")] = 20,
    retry: Annotated[
        bool, typer.Option("--retry", help="Start the failed steps of RUN again, as Retry in the UI does.")
    ] = False,
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """List the newest runs, or the steps of one run with the reason why a step failed or waits."""
    from minicpmv_finetune.kubeflow.client import HOW_TO_LINK
    from minicpmv_finetune.kubeflow.run_reasons import explained_steps, why_no_step
    from minicpmv_finetune.kubeflow.runs import find_run, list_runs
    from minicpmv_finetune.kubeflow.runs import retry as start_again
    from minicpmv_finetune.kubeflow.tracking_server import end_tracked_runs

    if (retry or dry_run) and not run:
        raise UserError("runs --retry: name the run to start again, as in `runs --retry RUN`.")
    if dry_run and not retry:
        raise UserError("runs --dry-run: only --retry changes something; leave --dry-run out.")
    cluster = _connect(_load(profile, namespace))
    if not run:
        rows = [asdict(row) for row in list_runs(cluster, experiment, most)]
        _print(rows, output, lambda: text_table(rows) or "no runs")
        if rows and not rows[0]["link"]:
            print_sentence(f"note: {HOW_TO_LINK}")
        return
    found = find_run(cluster, run)
    if retry:
        start_again(cluster, found, dry_run)
        answer = {"run_id": found.run_id, "changed": True, "dry_run": dry_run}
        change = "would be started again" if dry_run else "is being started again"
        _print(answer, output, lambda: f"{found.display_name}: {change}; {cluster.where(found.run_id)}")
        return
    if found.state in ("FAILED", "CANCELED"):
        end_tracked_runs(cluster.profile, {found.run_id: found.state})
    rows = [asdict(step) for step in explained_steps(cluster, found)]
    columns = ("step", "state", "attempts", "seconds", "message")
    shown = [{name: row[name] for name in columns} for row in rows]

    def without_step() -> str:
        why = why_no_step(cluster, found)
        return f"{found.display_name}: {found.state}; no step has started yet" + (f"; {why}" if why else "")

    _print(rows, output, lambda: text_table(shown) or without_step())


@app.command(rich_help_panel=PANEL)
def logs(
    run: RunName,
    profile: ProfileName = "",
    namespace: Namespace = "",
    step: Annotated[
        str, typer.Option(help="Step, such as train; by default the step that failed, or the last one.")
    ] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Also print the lines of Kubeflow's launcher.")] = False,
) -> None:
    """Print the log of a step, as far as it has been written, also after its pod is gone."""
    from minicpmv_finetune.kubeflow.run_steps import list_steps
    from minicpmv_finetune.kubeflow.runs import find_run
    from minicpmv_finetune.kubeflow.step_logs import read_log, without_launcher

    cluster = _connect(_load(profile, namespace))
    found = find_run(cluster, run)
    started = [item for item in list_steps(found) if item.pod]
    wanted = [item for item in started if step in (item.step, item.name)] if step else started
    failed = [item for item in wanted if item.state == "FAILED"]
    if not wanted:
        names = ", ".join(item.step for item in started) or "none"
        subject = f"step {step} has not" if step else "no step has"
        raise UserError(f"{run}: {subject} started; steps with a log: {names}.")
    log = read_log(cluster, found, (failed or wanted)[-1])
    print(log if raw else without_launcher(log), end="")


@app.command(rich_help_panel=PANEL)
def cancel(
    run: RunName,
    profile: ProfileName = "",
    namespace: Namespace = "",
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """Stop a run, and end its run in MLflow as KILLED; a run that has finished stays as it is."""
    from minicpmv_finetune.kubeflow.runs import cancel as stop
    from minicpmv_finetune.kubeflow.runs import find_run
    from minicpmv_finetune.kubeflow.tracking_server import end_tracked_runs

    cluster = _connect(_load(profile, namespace))
    found = find_run(cluster, run)
    changed = stop(cluster, found, dry_run)
    if not dry_run and (changed or found.state in ("CANCELING", "CANCELED")):
        # No step of a run that is being stopped starts any more, so nothing would end it in MLflow.
        end_tracked_runs(cluster.profile, {found.run_id: "CANCELED"})
    change = "would be stopped" if dry_run else "is being stopped"
    answer = {"run_id": found.run_id, "changed": changed, "dry_run": dry_run}
    text = f"{found.display_name}: {change if changed else f'has finished or is stopping ({found.state})'}"
    _print(answer, output, lambda: text)


@app.command(rich_help_panel=PANEL)
def gc(
    profile: ProfileName = "",
    namespace: Namespace = "",
    root: Annotated[
        str, typer.Option(help="Folder that contains the runs' folders; by default the profile's pipeline root.")
    ] = "",
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Delete the listed folders, or only list them.")
    ] = False,
    min_age_days: Annotated[
        int, typer.Option(min=0, help="Leave out folders that were written to within this number of days.")
    ] = 7,
    output: OutputFormat = "text",
) -> None:
    """List run folders, shards and checkpoints that no run or registered model refers to; delete them with --delete."""
    from minicpmv_finetune.kubeflow.gc import delete as delete_folder
    from minicpmv_finetune.kubeflow.gc import find_unused
    from minicpmv_finetune.kubeflow.runs import ended_runs
    from minicpmv_finetune.kubeflow.tracking_server import end_tracked_runs

    cluster = _connect(_load(profile, namespace))
    found = find_unused(cluster, root, min_age_days)
    if delete:
        for item in found:
            delete_folder(item)
        end_tracked_runs(cluster.profile, ended_runs(cluster))
    state = "deleted" if delete else "unused"
    lines = [f"{state} {item.uri} ({item.bytes / 1e9:.2f} GB, last written {item.written})" for item in found]
    total = f"{len(found)} folders, {sum(item.bytes for item in found) / 1e9:.2f} GB {state}"
    _print([{**asdict(item), "deleted": delete} for item in found], output, lambda: "\n".join([*lines, total]))


@schedule_app.command("apply")
def apply_schedules(
    file: SchedulesFile,
    profile: ProfileName = "",
    namespace: Namespace = "",
    gpus: Gpus = None,
    registry: Registry = "",
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """Make the server's schedules match the file: create them, or replace those that differ."""
    from minicpmv_finetune.kubeflow.schedule import apply, load_schedules

    cluster = _connect(_load(profile, namespace, gpus, registry))
    changes = apply(cluster, load_schedules(file), dry_run)
    would = "would " if dry_run else ""
    _print(
        [asdict(change) for change in changes],
        output,
        lambda: "\n".join(f"{would}{change.verb} {change.name} ({change.why}): {change.when}" for change in changes),
    )


@schedule_app.command("list")
def list_schedules(profile: ProfileName = "", namespace: Namespace = "", output: OutputFormat = "text") -> None:
    """List the schedules on the server, with their times in words."""
    from minicpmv_finetune.kubeflow.schedule import list_schedules as find

    rows = [asdict(row) for row in find(_connect(_load(profile, namespace)))]
    _print(rows, output, lambda: text_table(rows) or "no schedules")


def _switch(enabled: bool) -> Callable[..., None]:
    """The command that resumes or pauses a schedule."""

    def switch(
        name: ScheduleName,
        profile: ProfileName = "",
        namespace: Namespace = "",
        dry_run: DryRun = False,
        output: OutputFormat = "text",
    ) -> None:
        from minicpmv_finetune.kubeflow.schedule import set_enabled

        changed = set_enabled(_connect(_load(profile, namespace)), name, enabled, dry_run)
        state = "resumed" if enabled else "paused"
        change = f"would be {state}" if dry_run else state
        text = f"{name}: {change if changed else f'was {state} already'}"
        _print({"name": name, "changed": changed, "dry_run": dry_run}, output, lambda: text)

    return switch


schedule_app.command("pause", help="Stop a schedule from starting runs, until it is resumed.")(_switch(enabled=False))
schedule_app.command("resume", help="Let a paused schedule start runs again.")(_switch(enabled=True))


@schedule_app.command("delete")
def delete_schedules(
    profile: ProfileName = "",
    namespace: Namespace = "",
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the schedule.")] = "",
    file: Annotated[Path | None, path_option("--file", "Delete the schedules in this file.", "-f")] = None,
    dry_run: DryRun = False,
    output: OutputFormat = "text",
) -> None:
    """Delete one schedule, or those in a file; runs that they started remain."""
    from minicpmv_finetune.kubeflow.schedule import delete, load_schedules

    if bool(name) == bool(file):
        raise UserError("schedule delete: give either a NAME or -f FILE.")
    cluster = _connect(_load(profile, namespace))
    names = [schedule.name for schedule in load_schedules(file)] if file else [name]
    deleted = {item: delete(cluster, item, dry_run) for item in names}
    state = "would be deleted" if dry_run else "deleted"
    lines = [f"{item}: {state if existed else 'does not exist'}" for item, existed in deleted.items()]
    _print(deleted, output, lambda: "\n".join(lines))


def _load(profile: str, namespace: str, gpus: int | None = None, registry: str = "") -> "Profile":
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    settings = chosen_profile(profile, namespace)
    if gpus is not None:
        settings = settings.with_gpus(gpus)
    return settings.with_registry(registry) if registry else settings


def _connect(profile: "Profile") -> "Cluster":
    from minicpmv_finetune.kubeflow.client import connect

    return connect(profile)


_OBJECT = "apiVersion: pipelines.kubeflow.org/v2beta1\nkind: Pipeline\nmetadata:\n  name: {name}\n"


def _refuse_other_file(output: Path) -> None:
    """Refuse to overwrite a file that is no compiled pipeline of this program.

    Raises:
        UserError: As the text says.
    """
    from minicpmv_finetune.outputs import check_file

    check_file(output, "compile")
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"{output}: compile writes YAML; give a name that ends with .yaml.")
    if output.exists():
        with output.open("rb") as file:
            start = file.read(4096).decode(errors="replace")
        is_own = any(
            start.startswith((f"# PIPELINE DEFINITION\n# Name: {pipeline.name}\n", _OBJECT.format(name=pipeline.name)))
            for pipeline in all_pipelines().values()
        )
        if not is_own:
            raise UserError(f"{output}: exists and is no pipeline that compile wrote; choose another file.")


def _print(answer: Any, output: Output, text: Callable[[], str]) -> None:
    print(json.dumps(answer, indent=1, ensure_ascii=False) if output == "json" else text())
