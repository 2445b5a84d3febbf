"""Recurring runs as code: a file lists them, and `apply` makes the server match the file.

Schedules are identified by name. Kubeflow cannot change a recurring run, only enable and disable it, so a schedule
that differs is replaced: the old run is disabled, the new one is created, and the old one is deleted; after a failure
on the way, one of the two is still enabled. A digest in the description shows whether a schedule differs, because the
server rewrites the definition that it receives. `version: latest` refers to the pipeline alone, and the server then
uses the newest version at every tick; kfp's own client cannot request that.

Kubeflow's cron expressions have six fields, seconds first, and it reads five fields as the first five of these:
`0 3 * * 1` would mean three minutes past every hour in January. Therefore five fields are accepted here with their
usual meaning, and sent with the second 0 in front. Times are in the server's time zone and never converted.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import kfp_server_api
from cron_descriptor import ExpressionDescriptor, Options
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from minicpmv_finetune.errors import MistakesError, RetryableError, UserError, describe_validation_error
from minicpmv_finetune.inputs.recipe import RECIPES, over_recipe, recipe_for
from minicpmv_finetune.inputs.table import defaults
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.pipelines import PipelineChoice, pipeline_of
from minicpmv_finetune.yaml_files import read_mapping

from .client import Cluster, name_filter
from .compiling import content_digest, pipeline_for
from .parameters import resolve_parameters
from .submit import DEFAULT_EXPERIMENT, ensure_version, plugins_input, runtime_config

LATEST = "latest"
_DIGEST = re.compile(r"\[definition ([0-9a-f]{12})\]")
_FIELD_RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NUMBERS = {
    name: str(number)
    for names, first in (("jan feb mar apr may jun jul aug sep oct nov dec", 1), ("sun mon tue wed thu fri sat", 0))
    for number, name in enumerate(names.split(), first)
}

Action = Literal["create", "replace", "pause", "resume", "delete", "keep"]


def to_six_fields(cron: str) -> str:
    """A cron expression in Kubeflow's format, seconds first.

    Raises:
        ValueError: The expression is invalid, or the server would read it differently.
    """
    fields = cron.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise ValueError(
            f"{cron!r} has {len(fields)} fields; a cron expression has five, or six with the seconds first"
        )
    for field, (lowest, highest) in zip(fields, _FIELD_RANGES, strict=True):
        for part in field.lower().split(","):
            match = re.fullmatch(r"(\*|\?|\w+(-\w+)?)(/[1-9]\d*)?", part)
            bounds = [_NUMBERS.get(bound, bound) for bound in match[1].split("-")] if match else [""]
            if bounds not in (["*"], ["?"]) and not all(
                bound.isdecimal() and lowest <= int(bound) <= highest for bound in bounds
            ):
                raise ValueError(f"{part!r} in {cron!r} is not between {lowest} and {highest}")
    return " ".join(fields)


def describe_time(cron: str, time_zone: str) -> str:
    """A cron expression in words, with the server's time zone."""
    options = Options()
    options.use_24hour_time_format = True
    options.verbose = True
    words = ExpressionDescriptor(cron.replace("?", "*"), options).get_description()
    return f"{words}, in the server's time zone ({time_zone})"


class Schedule(BaseModel):
    """One recurring run in a file of schedules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128)
    cron: Annotated[str, AfterValidator(to_six_fields)]
    pipeline: PipelineChoice = Field(default="retrain", description="Pipeline that runs.")
    recipe: str = Field(default="", description="Recipe that `parameters` lie over.", exclude=True)
    parameters: dict[str, Any]
    description: str = ""
    version: str = Field(
        default=LATEST, description="latest, current (as this checkout compiles it), or the name of a version."
    )
    paused: bool | None = Field(default=None, description="Whether it is paused; none leaves it as it is.")
    no_catchup: bool = Field(default=True, description="Whether runs that were missed during a pause are skipped.")
    max_concurrency: int = Field(default=1, ge=1, le=10)
    experiment: str = DEFAULT_EXPERIMENT
    mlflow_experiment: str = ""

    @model_validator(mode="after")
    def _keeps_its_parameters(self) -> Self:
        if self.mlflow_experiment and self.version != LATEST:
            raise ValueError(
                f"schedule {self.name}: with mlflow_experiment and a pinned version ({self.version}) the server drops "
                "the parameters; use version latest, or leave mlflow_experiment out"
            )
        return self


@dataclass(frozen=True)
class Change:
    """One change that `apply` makes, or would make.

    Attributes:
        verb: What happens to the schedule.
        name: Name of the schedule.
        why: Reason of the change.
        when: Times of the schedule in words.
    """

    verb: Action
    name: str
    why: str
    when: str


@dataclass(frozen=True)
class ScheduleRow:
    """One recurring run in a list.

    Attributes:
        name: Name of the schedule.
        recurring_run_id: Id on the server.
        enabled: Whether it starts runs.
        cron: Cron expression with six fields; empty if a period decides the times.
        when: The same in words.
        version: Id of the pipeline version, or `latest`.
    """

    name: str
    recurring_run_id: str
    enabled: bool
    cron: str
    when: str
    version: str


def load_schedules(path: Path) -> list[Schedule]:
    """Read the list `schedules` of a YAML file.

    Raises:
        UserError: The file cannot be read, a field is unknown or has a wrong value, there is no such recipe, or two
            schedules have one name.
    """
    remedy = "see docs/kubeflow-schedule.md"
    listed = read_mapping(path, "schedules", remedy).get("schedules")
    if not isinstance(listed, list):
        raise UserError(f"{path}: contains no list `schedules`; {remedy}.")
    try:
        schedules = [Schedule.model_validate(item) for item in listed]
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation_error(error, 'schedule')}; {remedy}.") from error
    names = [schedule.name for schedule in schedules]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two schedules have the name {name}; give each its own name.")
    return [_with_recipe(schedule, path) for schedule in schedules]


def _with_recipe(schedule: Schedule, path: Path) -> Schedule:
    """A schedule whose parameters contain those of its recipe; the path of a recipe is relative to the schedules'."""
    if not schedule.recipe:
        return schedule
    beside = path.parent / schedule.recipe
    name = str(beside) if schedule.recipe not in RECIPES and beside.exists() else schedule.recipe
    recipe = recipe_for(name, pipeline_of(schedule.pipeline).inputs)
    return schedule.model_copy(update={"parameters": over_recipe(recipe, schedule.parameters)})


def apply(cluster: Cluster, schedules: Sequence[Schedule], dry_run: bool) -> list[Change]:
    """Make the server's recurring runs with these names match the schedules; others are left alone.

    Raises:
        UserError: An input of a schedule is wrong, or the server refuses.
        RetryableError: The server does not answer; apply the schedules again.
    """
    resolved, mistakes = [], []
    for schedule in schedules:
        try:
            parameters = resolve_parameters(pipeline_of(schedule.pipeline), schedule.parameters, cluster.profile)
        except MistakesError as error:
            mistakes += [f"schedule {schedule.name}: {sentence}" for sentence in error.sentences]
        else:
            resolved.append(schedule.model_copy(update={"parameters": parameters}))
    raise_mistakes(mistakes)
    return [change for schedule in resolved for change in _reconcile(cluster, schedule, dry_run)]


def list_schedules(cluster: Cluster) -> list[ScheduleRow]:
    """Every recurring run of the namespace."""
    return [
        ScheduleRow(
            found.display_name,
            found.recurring_run_id,
            _is_enabled(found),
            _cron(found),
            describe_time(_cron(found), _time_zone(cluster)) if _cron(found) else "",
            (found.pipeline_version_reference and found.pipeline_version_reference.pipeline_version_id) or LATEST,
        )
        for found in _list_existing(cluster)
    ]


def set_enabled(cluster: Cluster, name: str, enabled: bool, dry_run: bool) -> bool:
    """Resume or pause the recurring runs with a name; returns whether this changes any of them.

    Raises:
        UserError: No recurring run has this name.
    """
    existing = list(_list_existing(cluster, name))
    if not existing:
        raise UserError(f"{name}: no schedule has this name; see `minicpmv-finetune schedule list`.")
    changed = [found for found in existing if _is_enabled(found) != enabled]
    for found in [] if dry_run else changed:
        _set_enabled(cluster, found, enabled)
    return bool(changed)


def delete(cluster: Cluster, name: str, dry_run: bool) -> bool:
    """Delete the recurring runs with a name; returns whether there are any. Runs that they started remain."""
    existing = list(_list_existing(cluster, name))
    for found in [] if dry_run else existing:
        _delete(cluster, found)
    return bool(existing)


def _reconcile(cluster: Cluster, schedule: Schedule, dry_run: bool) -> Iterator[Change]:
    """Make the recurring runs with the schedule's name match it, and yield every change."""
    when = describe_time(schedule.cron, _time_zone(cluster))
    existing = list(_list_existing(cluster, schedule.name))
    reference = _pipeline_reference(cluster, schedule, dry_run)
    schedule = _with_defaults(cluster, schedule, reference)
    digest = _definition_digest(cluster, schedule, reference)
    same = [found for found in existing if _stored_digest(found) == digest]
    if not same:
        action: Action = "replace" if existing else "create"
        yield Change(action, schedule.name, "differs from the file" if existing else "does not exist yet", when)
        if not dry_run:
            _replace(cluster, schedule, reference, digest, existing)
        return
    kept, surplus = same[0], [found for found in existing if found is not same[0]]
    for found in surplus:
        yield Change("delete", schedule.name, f"{found.recurring_run_id} has the same name", when)
        if not dry_run:
            _delete(cluster, found)
    is_enabled = _is_enabled(kept)
    if schedule.paused is None or is_enabled != schedule.paused:
        yield Change("keep", schedule.name, "matches the file", when)
        return
    reason = f"the file contains paused: {'true' if schedule.paused else 'false'}"
    yield Change("pause" if is_enabled else "resume", schedule.name, reason, when)
    if not dry_run:
        _set_enabled(cluster, kept, not is_enabled)


def _replace(
    cluster: Cluster,
    schedule: Schedule,
    reference: kfp_server_api.V2beta1PipelineVersionReference,
    digest: str,
    existing: Sequence[kfp_server_api.V2beta1RecurringRun],
) -> None:
    """Create the schedule's recurring run and delete the existing ones; if creating fails, these are enabled again."""
    were_enabled = [found for found in existing if _is_enabled(found)]
    enabled = not schedule.paused if schedule.paused is not None else bool(were_enabled) or not existing
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=f"{schedule.description} [definition {digest}]".strip(),
        pipeline_version_reference=reference,
        runtime_config=runtime_config(cluster.profile, schedule.parameters),
        service_account=cluster.profile.service_account,
        max_concurrency=str(schedule.max_concurrency),
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=schedule.cron)),
        mode="ENABLE" if enabled else "DISABLE",
        no_catchup=schedule.no_catchup,
        namespace=cluster.namespace,
        experiment_id=cluster.ensure_experiment(schedule.experiment),
        plugins_input=plugins_input(schedule.mlflow_experiment),
    )
    for found in were_enabled:
        _set_enabled(cluster, found, False)
    try:
        cluster.call(cluster.client.recurring_runs.recurring_run_service_create_recurring_run, body)
    except (UserError, RetryableError):
        for found in were_enabled:
            _set_enabled(cluster, found, True)
        raise
    for found in existing:
        _delete(cluster, found)


def _pipeline_reference(
    cluster: Cluster, schedule: Schedule, dry_run: bool
) -> kfp_server_api.V2beta1PipelineVersionReference:
    """The schedule's pipeline and version, uploaded if the server lacks them; `latest` refers to no version."""
    pipeline = pipeline_of(schedule.pipeline)
    pipeline_id = cluster.pipeline_id(pipeline.name)
    version_id = None
    if schedule.version not in (LATEST, "current"):
        version_id = cluster.version_id(pipeline_id, schedule.version)
        if version_id is None:
            raise UserError(
                f"{schedule.name}: {pipeline.name} has no version {schedule.version}; submit this version once, or "
                "use latest or current."
            )
    elif not dry_run and (pipeline_id is None or schedule.version == "current"):
        pipeline_id, current = ensure_version(cluster, pipeline, pipeline_for(pipeline, cluster.profile))
        version_id = current if schedule.version == "current" else None
    elif schedule.version == "current":
        version_id = cluster.version_id(pipeline_id, content_digest(pipeline_for(pipeline, cluster.profile)))
    return kfp_server_api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id, pipeline_version_id=version_id)


def _with_defaults(
    cluster: Cluster, schedule: Schedule, reference: kfp_server_api.V2beta1PipelineVersionReference
) -> Schedule:
    """The schedule with every default, as `submit` sends them: the UI compares runs by what they were given.

    A version that this program did not upload may lack inputs, and the server refuses those that it does not know.
    """
    known = defaults(pipeline_of(schedule.pipeline).inputs)
    is_own = schedule.version == "current" or reference.pipeline_id is None
    if not is_own:
        names = cluster.version_inputs(reference.pipeline_id, reference.pipeline_version_id)
        known = {name: value for name, value in known.items() if name in names}
    return schedule.model_copy(update={"parameters": {**known, **schedule.parameters}})


def _definition_digest(
    cluster: Cluster, schedule: Schedule, reference: kfp_server_api.V2beta1PipelineVersionReference
) -> str:
    """Twelve hexadecimal digits that differ where the recurring run must be replaced."""
    content = {
        **schedule.model_dump(exclude={"paused"}),
        "pipeline": [reference.pipeline_id, reference.pipeline_version_id],
        "service_account": cluster.profile.service_account,
        "pipeline_root": cluster.profile.pipeline_root,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _stored_digest(found: kfp_server_api.V2beta1RecurringRun) -> str:
    """The digest in a recurring run's description; empty if there is none."""
    match = _DIGEST.search(found.description or "")
    return match[1] if match else ""


def _list_existing(cluster: Cluster, name: str | None = None) -> Iterator[kfp_server_api.V2beta1RecurringRun]:
    """The namespace's recurring runs, or those with a name."""
    options = {"namespace": cluster.namespace} if cluster.namespace else {}
    if name is not None:
        options["filter"] = name_filter(name)
    service = cluster.client.recurring_runs.recurring_run_service_list_recurring_runs
    return cluster.list_all(service, "recurring_runs", **options)


def _is_enabled(found: kfp_server_api.V2beta1RecurringRun) -> bool:
    return bool(found.status == "ENABLED")


def _set_enabled(cluster: Cluster, found: kfp_server_api.V2beta1RecurringRun, enabled: bool) -> None:
    services = cluster.client.recurring_runs
    enable = services.recurring_run_service_enable_recurring_run
    disable = services.recurring_run_service_disable_recurring_run
    cluster.call(enable if enabled else disable, found.recurring_run_id)


def _delete(cluster: Cluster, found: kfp_server_api.V2beta1RecurringRun) -> None:
    cluster.call(cluster.client.recurring_runs.recurring_run_service_delete_recurring_run, found.recurring_run_id)


def _cron(found: kfp_server_api.V2beta1RecurringRun) -> str:
    schedule = found.trigger and found.trigger.cron_schedule
    return str(schedule.cron) if schedule and schedule.cron else ""


def _time_zone(cluster: Cluster) -> str:
    return cluster.profile.kubeflow_pipelines.time_zone
