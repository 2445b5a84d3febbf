"""Start a run: upload the pipeline if it changed, check the inputs, create the run, and follow it if asked.

A pipeline version is named after its content, so whether it changed is a look-up. A run that is given a name is found
again by it, so that a command that was cut off can be given again and starts nothing twice.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.pipelines.inputs import INPUTS, check_inputs
from minicpmv_finetune.pipelines.pipeline import Pipeline

from .client import Cluster, equals
from .compiling import content_digest, pipeline_for, write_pipeline
from .profile import Profile

DEFAULT_EXPERIMENT = "minicpmv-finetune"
_PLACES = ("data_uri", "eval_data_uri", "base_model_uri")


@dataclass(frozen=True)
class Request:
    """What somebody wants to run.

    Attributes:
        pipeline: which pipeline.
        parameters: inputs of the pipeline, checked.
        name: shown in the UI; the same name with the same content is the same run. Empty makes one up.
        experiment: of Kubeflow Pipelines; made if need be.
        mlflow_experiment: passed to Kubeflow's MLflow plugin; empty leaves it to the server.
    """

    pipeline: Pipeline
    parameters: Mapping[str, Any]
    name: str = ""
    experiment: str = DEFAULT_EXPERIMENT
    mlflow_experiment: str = ""


@dataclass(frozen=True)
class Submission:
    """What was done, or would be: `uploaded` and `started` say which of it was new."""

    pipeline_version: str
    uploaded: bool
    name: str
    started: bool
    run_id: str
    link: str
    parameters: Mapping[str, Any]


def submit(cluster: Cluster, request: Request, dry_run: bool = False) -> Submission:
    """Start a run of a pipeline as it is now.

    Raises:
        UserError: the server refuses, or a run of that name does something else.
        RetryableError: the server does not answer; give the command again, with the same name.
    """
    pipeline = request.pipeline
    version = content_digest(pipeline_for(pipeline, cluster.profile))
    pipeline_id = cluster.pipeline_id(pipeline.name)
    version_id = find_version(cluster, pipeline_id, version)
    uploaded = version_id is None
    experiment_id = cluster.experiment_id(request.experiment)
    name = request.name or f"{pipeline.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    known = _same_run(cluster, experiment_id, version_id, request) if request.name and experiment_id else None
    if known or dry_run:
        run_id = known.run_id if known else ""
        link = cluster.link(f"runs/details/{run_id}") if known else ""
        return Submission(version, uploaded, name, known is None, run_id, link, request.parameters)
    pipeline_id, version_id = ensure_version(cluster, pipeline)
    run = cluster.call(
        cluster.client.runs.run_service_create_run,
        kfp_server_api.V2beta1Run(
            experiment_id=experiment_id or cluster.create_experiment(request.experiment),
            display_name=name,
            pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(pipeline_id, version_id),
            runtime_config=runtime_config(cluster.profile, request.parameters),
            service_account=cluster.profile.service_account,
            plugins_input=plugins_input(request.mlflow_experiment),
        ),
    )
    link = cluster.link(f"runs/details/{run.run_id}")
    return Submission(version, uploaded, name, True, run.run_id, link, request.parameters)


def ensure_version(cluster: Cluster, pipeline: Pipeline) -> tuple[str, str]:
    """Ids of the pipeline and of the version with its present content, uploaded if the server does not have it."""
    version = content_digest(pipeline_for(pipeline, cluster.profile))
    pipeline_id = cluster.pipeline_id(pipeline.name)
    if pipeline_id is None:
        body = kfp_server_api.V2beta1Pipeline(
            display_name=pipeline.name, description=pipeline.description, namespace=cluster.namespace
        )
        try:
            made = cluster.call(cluster.client.pipelines.pipeline_service_create_pipeline, body)
            pipeline_id = str(made.pipeline_id)
        except UserError:
            # Somebody else was faster.
            pipeline_id = cluster.pipeline_id(pipeline.name)
            if pipeline_id is None:
                raise
    found = find_version(cluster, pipeline_id, version)
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_pipeline(pipeline, cluster.profile, Path(folder) / "pipeline.yaml")
            try:
                uploaded = cluster.call(
                    cluster.client.pipeline_uploads.upload_pipeline_version,
                    str(path),
                    name=version,
                    pipelineid=pipeline_id,
                )
                return pipeline_id, str(uploaded.pipeline_version_id)
            except UserError:
                found = find_version(cluster, pipeline_id, version)
                if found is None:
                    raise
    return pipeline_id, found


def find_version(cluster: Cluster, pipeline_id: str | None, version: str) -> str | None:
    """The id of a pipeline's version of that name, if the server has it."""
    if pipeline_id is None:
        return None
    service = cluster.client.pipelines.pipeline_service_list_pipeline_versions
    for found in cluster.every(service, "pipeline_versions", pipeline_id, filter=equals(version)):
        return str(found.pipeline_version_id)
    return None


def runtime_config(profile: Profile, parameters: Mapping[str, Any]) -> kfp_server_api.V2beta1RuntimeConfig:
    """Parameters, and where artifacts go if the profile says so."""
    return kfp_server_api.V2beta1RuntimeConfig(parameters=dict(parameters), pipeline_root=profile.pipeline_root or None)


def plugins_input(mlflow_experiment: str) -> dict[str, Any] | None:
    """What Kubeflow's MLflow plugin is told; without the plugin the server ignores it."""
    return {"mlflow": {"experiment_name": mlflow_experiment}} if mlflow_experiment else None


def _same_run(
    cluster: Cluster, experiment_id: str, version_id: str | None, request: Request
) -> kfp_server_api.V2beta1Run | None:
    """The run that this very request started before, unless it came to a bad end."""
    for run in cluster.runs(experiment_id, request.name):
        if run.state in ("FAILED", "CANCELED", "CANCELING"):
            continue
        reference = run.pipeline_version_reference
        same_version = reference is not None and reference.pipeline_version_id == version_id
        given = (run.runtime_config.parameters or {}) if run.runtime_config else {}
        if same_version and given == dict(request.parameters):
            return run
        what = "other parameters" if same_version else "another version of the pipeline"
        raise UserError(
            f"{request.name}: run {run.run_id} has this name already and {what}; choose another name, or leave it out."
        )
    return None


def read_parameters(
    pipeline: Pipeline, assignments: Sequence[str], file: Path | None, profile: Profile
) -> dict[str, Any]:
    """Inputs of the pipeline from a YAML file and `name=value` words, which win; checked against what it takes.

    Raises:
        UserError: an input is unknown, missing, of the wrong type, or lies where the cluster cannot reach it.
    """
    given: dict[str, Any] = {}
    if file:
        try:
            said = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{file}: cannot be read ({type(error).__name__}); give a YAML file of inputs.") from error
        if not isinstance(said, dict):
            raise UserError(f"{file}: not a YAML mapping of inputs by name; write it like data_uri: s3://….")
        given.update(said)
    for assignment in assignments:
        name, mark, value = assignment.partition("=")
        if not mark:
            raise UserError(f"{assignment}: no value; write it as name=value.")
        given[name] = value
    return check_parameters(pipeline, given, profile)


def check_parameters(pipeline: Pipeline, given: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The same inputs as values of the pipeline's types.

    Raises:
        UserError: see `read_parameters`.
    """
    checked = check_inputs(pipeline.inputs, given)
    for name in _PLACES:
        _check_reachable(name, str(checked.get(name, "")), profile)
    return checked


def _check_reachable(name: str, place: str, profile: Profile) -> None:
    if not place or storage.is_object_uri(place) or place.startswith("hf://"):
        return
    mounted = profile.base_models.mount if profile.base_models else None
    if name == "base_model_uri" and (not place.startswith((".", "/", "~")) or (mounted and place.startswith(mounted))):
        return
    raise UserError(f"{name}: {place} lies on this machine, where the cluster cannot read it; copy it to s3:// first.")


def pin_base_model(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, a base model of the hub with the commit that its name means today.

    A schedule or a retry that fetched whatever the branch holds by then would compare with a base that nobody chose.

    Raises:
        UserError: the hub has no such model.
        RetryableError: the hub does not answer.
    """
    place = str(parameters.get("base_model_uri") or INPUTS["base_model_uri"].default)
    name, _, revision = place.removeprefix("hf://").partition("@")
    if revision or storage.is_object_uri(place) or place.startswith("/"):
        return {**parameters, "base_model_uri": place}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        commit = HfApi().model_info(name, timeout=10).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name}: the hub has no such model; check the spelling, or set HF_TOKEN.") from error
    except Exception as error:
        # The hub's client lets its HTTP library's exceptions through, and has changed that library before.
        raise RetryableError(
            f"{name}: the hub does not answer, so its commit is not known; write {name}@COMMIT, or try again."
        ) from error
    return {**parameters, "base_model_uri": f"{place}@{commit}"}
