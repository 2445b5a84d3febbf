"""A pipeline with the settings of a cluster on its tasks, and the files that Kubeflow Pipelines reads."""

import hashlib
import json
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions
from kfp.dsl.graph_component import GraphComponent

from minicpmv_finetune.pipelines.pipeline import Pipeline

from .profile import Profile, with_profile


def pipeline_for(pipeline: Pipeline, profile: Profile) -> GraphComponent:
    """The pipeline with a cluster's settings on its tasks.

    Args:
        pipeline: One of `FINETUNE` and `RETRAIN`.
        profile: Settings of the cluster.
    """
    return with_profile(pipeline.build(profile.preprocess_partitions), profile)


def write_pipeline(pipeline: Pipeline, profile: Profile, path: Path) -> Path:
    """Write the pipeline with a cluster's settings as the YAML file that Kubeflow Pipelines reads.

    Args:
        pipeline: One of `FINETUNE` and `RETRAIN`.
        profile: Settings of the cluster.
        path: File to write.

    Returns:
        The file.
    """
    return write_component(pipeline_for(pipeline, profile), path)


def write_component(component: GraphComponent, path: Path) -> Path:
    """Write a pipeline that has a cluster's settings as the YAML file that Kubeflow Pipelines reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(component, str(path))
    return path


def write_objects(pipeline: Pipeline, profile: Profile, path: Path) -> Path:
    """Write the pipeline as `Pipeline` and `PipelineVersion` objects, for clusters that store pipelines in Kubernetes.

    A version cannot be changed after it is applied, so its name contains a digest of its content.
    """
    component = pipeline_for(pipeline, profile)
    options = KubernetesManifestOptions(
        pipeline_name=pipeline.name,
        pipeline_display_name=pipeline.display_name,
        pipeline_version_name=f"{pipeline.name}-{content_digest(component)}",
        namespace=profile.namespace,
        include_pipeline_manifest=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        component, str(path), kubernetes_manifest_format=True, kubernetes_manifest_options=options
    )
    return path


def content_digest(component: GraphComponent) -> str:
    """Twelve hexadecimal digits that change whenever the pipeline or its cluster's settings change."""
    content = [MessageToDict(component.pipeline_spec), MessageToDict(component.platform_spec)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
