"""Start a run: upload the pipeline if its content changed, and create the run.

A pipeline version is named after its content, so a look-up shows whether the content changed. A run with a name given
by the user is found again by this name, so that an interrupted command can be repeated and starts nothing twice.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api
from kfp.dsl.graph_component import GraphComponent

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.pipelines.pipeline import Pipeline

from .client import Cluster
from .compiling import content_digest, pipeline_for, write_component
from .profile import Profile

DEFAULT_EXPERIMENT = "minicpmv-finetune"


@dataclass(frozen=True)
class Request:
    """A run that a user requests.

    Attributes:
        pipeline: Pipeline to run.
        parameters: Inputs of the pipeline, checked.
        name: Name in the UI; the same name with the same content is the same run. Empty generates a name.
        experiment: Experiment of Kubeflow Pipelines, created if necessary.
        mlflow_experiment: Experiment for Kubeflow's MLflow plugin; empty leaves it to the server.
    """

    pipeline: Pipeline
    parameters: Mapping[str, Any]
    name: str = ""
    experiment: str = DEFAULT_EXPERIMENT
    mlflow_experiment: str = ""


@dataclass(frozen=True)
class Submission:
    """What `submit` did, or would do.

    Attributes:
        pipeline_version: Name of the pipeline version.
        uploaded: Whether the version was new on the server.
        name: Name of the run.
        started: Whether the run was new.
        run_id: Id of the run; empty if it was not started.
        link: Address of the run in the UI; empty if it was not started, or the UI's address is not known.
        parameters: Inputs of the run.
    """

    pipeline_version: str
    uploaded: bool
    name: str
    started: bool
    run_id: str
    link: str
    parameters: Mapping[str, Any]


def submit(cluster: Cluster, request: Request, dry_run: bool = False) -> Submission:
    """Start a run of a pipeline with its current content.

    Args:
        cluster: The server and its profile.
        request: The run.
        dry_run: Say what would be done, and do nothing.

    Returns:
        What was done, with the run's id and link.

    Raises:
        UserError: The server refuses, or a different run has this name.
        RetryableError: The server does not answer; repeat the command with the same name.
    """
    pipeline = request.pipeline
    component = pipeline_for(pipeline, cluster.profile)
    version = content_digest(component)
    version_id = cluster.version_id(cluster.pipeline_id(pipeline.name), version)
    uploaded = version_id is None
    name = request.name or f"{pipeline.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    existing = _find_run(cluster, version_id, request) if request.name else None
    if existing or dry_run:
        run_id = str(existing.run_id) if existing else ""
        link = cluster.run_link(run_id) if existing else ""
        return Submission(version, uploaded, name, existing is None, run_id, link, request.parameters)
    pipeline_id, version_id = ensure_version(cluster, pipeline, component)
    run = cluster.call(
        cluster.client.runs.run_service_create_run,
        kfp_server_api.V2beta1Run(
            experiment_id=cluster.ensure_experiment(request.experiment),
            display_name=name,
            pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(pipeline_id, version_id),
            runtime_config=runtime_config(cluster.profile, request.parameters),
            service_account=cluster.profile.service_account,
            plugins_input=plugins_input(request.mlflow_experiment),
        ),
    )
    return Submission(version, uploaded, name, True, run.run_id, cluster.run_link(run.run_id), request.parameters)


def ensure_version(cluster: Cluster, pipeline: Pipeline, component: GraphComponent) -> tuple[str, str]:
    """Ids of the pipeline and of the version with its current content; both are created if the server lacks them.

    Args:
        cluster: The server and its profile.
        pipeline: The pipeline.
        component: The same with the profile's settings, by `pipeline_for`.
    """
    version = content_digest(component)
    pipeline_id = _ensure_pipeline(cluster, pipeline)
    if found := cluster.version_id(pipeline_id, version):
        return pipeline_id, found
    with tempfile.TemporaryDirectory() as folder:
        path = write_component(component, Path(folder) / "pipeline.yaml")
        try:
            uploaded = cluster.call(
                cluster.client.pipeline_uploads.upload_pipeline_version,
                str(path),
                name=version,
                pipelineid=pipeline_id,
            )
        except UserError:
            # Another process may have uploaded it since the look-up.
            if found := cluster.version_id(pipeline_id, version):
                return pipeline_id, found
            raise
    return pipeline_id, str(uploaded.pipeline_version_id)


def _ensure_pipeline(cluster: Cluster, pipeline: Pipeline) -> str:
    """The id of the pipeline, which is created without a version if the server lacks it."""
    if found := cluster.pipeline_id(pipeline.name):
        return found
    body = kfp_server_api.V2beta1Pipeline(
        display_name=pipeline.name, description=pipeline.guide, namespace=cluster.namespace
    )
    try:
        created = cluster.call(cluster.client.pipelines.pipeline_service_create_pipeline, body)
    except UserError:
        # Another process may have created it since the look-up.
        if found := cluster.pipeline_id(pipeline.name):
            return found
        raise
    return str(created.pipeline_id)


def runtime_config(profile: Profile, parameters: Mapping[str, Any]) -> kfp_server_api.V2beta1RuntimeConfig:
    """A run's parameters, and its pipeline root if the profile names one."""
    return kfp_server_api.V2beta1RuntimeConfig(parameters=dict(parameters), pipeline_root=profile.pipeline_root or None)


def plugins_input(mlflow_experiment: str) -> dict[str, Any] | None:
    """The settings of Kubeflow's MLflow plugin; a server without the plugin ignores them."""
    return {"mlflow": {"experiment_name": mlflow_experiment}} if mlflow_experiment else None


def _find_run(cluster: Cluster, version_id: str | None, request: Request) -> kfp_server_api.V2beta1Run | None:
    """The run that the same request started before, unless it failed or was stopped.

    Raises:
        UserError: A run with this name has other parameters, or another version of the pipeline.
    """
    experiment_id = cluster.experiment_id(request.experiment)
    if experiment_id is None:
        return None
    for run in cluster.runs(experiment_id, request.name):
        if run.state in ("FAILED", "CANCELED", "CANCELING"):
            continue
        reference = run.pipeline_version_reference
        same_version = reference is not None and reference.pipeline_version_id == version_id
        given = (run.runtime_config.parameters or {}) if run.runtime_config else {}
        if same_version and given == dict(request.parameters):
            return run
        difference = "other parameters" if same_version else "another version of the pipeline"
        raise UserError(
            f"{request.name}: run {run.run_id} already has this name, and {difference}; choose another name, or leave "
            "it out."
        )
    return None
