"""Recurring runs as code: a file says which there are, and `apply` makes the server agree, by name.

Kubeflow cannot change a recurring run, only switch it on and off, so one that differs is replaced: the old one is
switched off, the new one made, the old one deleted; a failure on the way leaves one that runs. Whether one differs is
told by a digest in its description, since the server rewrites what it is given. `version: latest` refers to the
pipeline alone, and the server then takes the newest version at every tick; kfp's own client cannot ask for that.

Kubeflow's times have six fields, seconds first, and it reads five as the first five of them: `0 3 * * 1` would mean
three minutes past every hour of January. So five are accepted here in the meaning everyone else gives them, and sent
with the second 0 in front.
They are in the server's time zone, and never converted.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import kfp_server_api
import yaml
from cron_descriptor import ExpressionDescriptor, Options
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from minicpmv_finetune.errors import RetryableError, UserError, describe_validation_error
from minicpmv_finetune.pipelines import PipelineChoice, pipeline_of

from .client import Cluster, equals
from .compiling import content_digest, pipeline_for
from .submit import (
    DEFAULT_EXPERIMENT,
    check_parameters,
    ensure_version,
    find_version,
    pin_base_model,
    plugins_input,
    runtime_config,
)

LATEST = "latest"
_DIGEST = re.compile(r"\[definition ([0-9a-f]{12})\]")
_LOWEST_HIGHEST = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMES = {
    name: str(number)
    for names, first in (("jan feb mar apr may jun jul aug sep oct nov dec", 1), ("sun mon tue wed thu fri sat", 0))
    for number, name in enumerate(names.split(), first)
}

Verb = Literal["create", "replace", "pause", "resume", "delete", "keep"]


def six_fields(cron: str) -> str:
    """A cron expression as Kubeflow reads it, seconds first.

    Raises:
        ValueError: it is none, or one that the server would read otherwise.
    """
    fields = cron.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise ValueError(f"{cron!r} has {len(fields)} fields; a time has five, or six with seconds first")
    for field, (lowest, highest) in zip(fields, _LOWEST_HIGHEST, strict=True):
        for part in field.lower().split(","):
            match = re.fullmatch(r"(\*|\?|\w+(-\w+)?)(/[1-9]\d*)?", part)
            bounds = [_NAMES.get(bound, bound) for bound in match[1].split("-")] if match else [""]
            if bounds not in (["*"], ["?"]) and not all(
                bound.isdecimal() and lowest <= int(bound) <= highest for bound in bounds
            ):
                raise ValueError(f"{part!r} in {cron!r} is not between {lowest} and {highest}")
    return " ".join(fields)


def in_words(cron: str, time_zone: str) -> str:
    """A time as a sentence, with the server's time zone."""
    options = Options()
    options.use_24hour_time_format = True
    options.verbose = True
    said = ExpressionDescriptor(cron.replace("?", "*"), options).get_description()
    return f"{said}, in the server's time zone ({time_zone})"


class Schedule(BaseModel):
    """One recurring run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128)
    cron: Annotated[str, AfterValidator(six_fields)]
    pipeline: PipelineChoice = Field(default="retrain", description="which pipeline runs")
    parameters: dict[str, Any]
    description: str = ""
    version: str = Field(
        default=LATEST, description="latest, current (as this checkout compiles it), or a version's name"
    )
    paused: bool | None = Field(default=None, description="none leaves on or off what somebody switched")
    no_catchup: bool = Field(default=True, description="runs missed while paused are not made up for")
    max_concurrency: int = Field(default=1, ge=1, le=10)
    experiment: str = DEFAULT_EXPERIMENT
    mlflow_experiment: str = ""


@dataclass(frozen=True)
class Step:
    """One thing that `apply` does, or would do, and why."""

    verb: Verb
    name: str
    why: str
    when: str


@dataclass(frozen=True)
class ScheduleRow:
    """One recurring run as a list shows it."""

    name: str
    recurring_run_id: str
    enabled: bool
    cron: str
    when: str
    version: str


def load_schedules(path: Path) -> list[Schedule]:
    """Read `schedules:` of a YAML file.

    Raises:
        UserError: there is no such file, it says something a schedule cannot say, or two have one name.
    """
    try:
        said = yaml.safe_load(path.read_text())
        schedules = [Schedule.model_validate(item) for item in said["schedules"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of schedules.") from error
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a YAML file with a list `schedules`; see docs/kubeflow-schedule.md.") from error
    except ValidationError as error:
        what = describe_validation_error(error, "schedule")
        raise UserError(f"{path}: {what}; see docs/kubeflow-schedule.md.") from error
    names = [schedule.name for schedule in schedules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two schedules are called {name}; give each a name of its own.")
    return schedules


def apply(cluster: Cluster, schedules: Sequence[Schedule], dry_run: bool) -> list[Step]:
    """Make the server's recurring runs of these names be what the file says; others are left alone.

    Raises:
        UserError: an input of a schedule is wrong, or the server refuses.
        RetryableError: the server does not answer; apply again.
    """
    checked = [
        schedule.model_copy(
            update={
                "parameters": pin_base_model(
                    check_parameters(pipeline_of(schedule.pipeline), schedule.parameters, cluster.profile)
                )
            }
        )
        for schedule in schedules
    ]
    return [step for schedule in checked for step in _reconcile(cluster, schedule, dry_run)]


def list_schedules(cluster: Cluster) -> list[ScheduleRow]:
    """Every recurring run of the namespace."""
    return [
        ScheduleRow(
            found.display_name,
            found.recurring_run_id,
            found.status == "ENABLED",
            _cron(found),
            in_words(_cron(found), _time_zone(cluster)) if _cron(found) else "",
            (found.pipeline_version_reference and found.pipeline_version_reference.pipeline_version_id) or LATEST,
        )
        for found in _existing(cluster, None)
    ]


def switch(cluster: Cluster, name: str, on: bool, dry_run: bool) -> bool:
    """Pause or resume the recurring runs of a name; whether any was not so already.

    Raises:
        UserError: there is none.
    """
    changed = [found for found in _named(cluster, name) if (found.status == "ENABLED") != on]
    for found in [] if dry_run else changed:
        _switch(cluster, found, on)
    return bool(changed)


def delete(cluster: Cluster, name: str, dry_run: bool) -> bool:
    """Delete the recurring runs of a name; whether there were any. Runs that they started stay."""
    found = list(_existing(cluster, name))
    for item in [] if dry_run else found:
        _delete(cluster, item)
    return bool(found)


def _reconcile(cluster: Cluster, schedule: Schedule, dry_run: bool) -> Iterator[Step]:
    when = in_words(schedule.cron, _time_zone(cluster))
    existing = list(_existing(cluster, schedule.name))
    reference = _reference(cluster, schedule, dry_run)
    wanted = _definition(cluster, schedule, reference)
    same = [found for found in existing if _digest_of(found) == wanted]
    if not same:
        verb: Verb = "replace" if existing else "create"
        yield Step(verb, schedule.name, "differs from the file" if existing else "not there yet", when)
        if not dry_run:
            _replace(cluster, schedule, reference, wanted, existing)
        return
    kept, surplus = same[0], [found for found in existing if found is not same[0]]
    for found in surplus:
        yield Step("delete", schedule.name, f"{found.recurring_run_id} has the same name", when)
        if not dry_run:
            _delete(cluster, found)
    on = kept.status == "ENABLED"
    if schedule.paused is None or on != schedule.paused:
        yield Step("keep", schedule.name, "as the file says", when)
        return
    yield Step("pause" if on else "resume", schedule.name, "the file says so", when)
    if not dry_run:
        _switch(cluster, kept, not on)


def _replace(
    cluster: Cluster,
    schedule: Schedule,
    reference: kfp_server_api.V2beta1PipelineVersionReference,
    definition: str,
    existing: Sequence[kfp_server_api.V2beta1RecurringRun],
) -> None:
    was_on = [found for found in existing if found.status == "ENABLED"]
    enabled = not schedule.paused if schedule.paused is not None else bool(was_on) or not existing
    experiment_id = cluster.experiment_id(schedule.experiment) or cluster.create_experiment(schedule.experiment)
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=f"{schedule.description} [definition {definition}]".strip(),
        pipeline_version_reference=reference,
        runtime_config=runtime_config(cluster.profile, schedule.parameters),
        service_account=cluster.profile.service_account,
        max_concurrency=str(schedule.max_concurrency),
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=schedule.cron)),
        mode="ENABLE" if enabled else "DISABLE",
        no_catchup=schedule.no_catchup,
        namespace=cluster.namespace,
        experiment_id=experiment_id,
        plugins_input=plugins_input(schedule.mlflow_experiment),
    )
    for found in was_on:
        _switch(cluster, found, False)
    try:
        cluster.call(cluster.client.recurring_runs.recurring_run_service_create_recurring_run, body)
    except (UserError, RetryableError):
        for found in was_on:
            _switch(cluster, found, True)
        raise
    for found in existing:
        _delete(cluster, found)


def _reference(cluster: Cluster, schedule: Schedule, dry_run: bool) -> kfp_server_api.V2beta1PipelineVersionReference:
    """Which pipeline, and which version of it unless the newest at every tick; uploaded if there is none yet."""
    pipeline = pipeline_of(schedule.pipeline)
    pipeline_id = cluster.pipeline_id(pipeline.name)
    version_id = None
    if schedule.version not in (LATEST, "current"):
        version_id = find_version(cluster, pipeline_id, schedule.version)
        if version_id is None:
            raise UserError(f"{schedule.name}: no version {schedule.version} of {pipeline.name}; submit it once first.")
    elif not dry_run and (pipeline_id is None or schedule.version == "current"):
        pipeline_id, current = ensure_version(cluster, pipeline)
        version_id = current if schedule.version == "current" else None
    elif schedule.version == "current":
        version_id = find_version(cluster, pipeline_id, content_digest(pipeline_for(pipeline, cluster.profile)))
    return kfp_server_api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id, pipeline_version_id=version_id)


def _definition(cluster: Cluster, schedule: Schedule, reference: kfp_server_api.V2beta1PipelineVersionReference) -> str:
    """Twelve digits that change with anything that only replacing can change."""
    content = {
        **schedule.model_dump(exclude={"paused"}),
        "pipeline": [reference.pipeline_id, reference.pipeline_version_id],
        "service_account": cluster.profile.service_account,
        "pipeline_root": cluster.profile.pipeline_root,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _digest_of(found: kfp_server_api.V2beta1RecurringRun) -> str:
    match = _DIGEST.search(found.description or "")
    return match[1] if match else ""


def _existing(cluster: Cluster, name: str | None) -> Iterator[kfp_server_api.V2beta1RecurringRun]:
    options = {"namespace": cluster.namespace} if cluster.namespace else {}
    if name is not None:
        options["filter"] = equals(name)
    service = cluster.client.recurring_runs.recurring_run_service_list_recurring_runs
    return cluster.every(service, "recurring_runs", **options)


def _named(cluster: Cluster, name: str) -> list[kfp_server_api.V2beta1RecurringRun]:
    found = list(_existing(cluster, name))
    if not found:
        raise UserError(f"{name}: no schedule has this name; see `minicpmv-finetune schedule list`.")
    return found


def _switch(cluster: Cluster, found: kfp_server_api.V2beta1RecurringRun, on: bool) -> None:
    services = cluster.client.recurring_runs
    enable = services.recurring_run_service_enable_recurring_run
    disable = services.recurring_run_service_disable_recurring_run
    cluster.call(enable if on else disable, found.recurring_run_id)


def _delete(cluster: Cluster, found: kfp_server_api.V2beta1RecurringRun) -> None:
    cluster.call(cluster.client.recurring_runs.recurring_run_service_delete_recurring_run, found.recurring_run_id)


def _cron(found: kfp_server_api.V2beta1RecurringRun) -> str:
    schedule = found.trigger and found.trigger.cron_schedule
    return str(schedule.cron) if schedule and schedule.cron else ""


def _time_zone(cluster: Cluster) -> str:
    return cluster.profile.kubeflow_pipelines.time_zone
