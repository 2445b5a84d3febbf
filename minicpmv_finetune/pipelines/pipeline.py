"""What a pipeline is: a name, its steps, its inputs, and the function that chains its tasks.

Everything that handles pipelines (compile, submit, schedule, clean up, the local run, the documentation) takes such a
value, so none of it knows how many pipelines there are or what they do.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes
from kfp.dsl import pipeline_context
from kfp.dsl.graph_component import GraphComponent

from minicpmv_finetune import container_images, environment

from .inputs import REQUIRED, Input


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of this project.

    Attributes:
        name: Its name on a server, and of the folder of its artifacts below the pipeline root.
        display_name: Its title in the Kubeflow UI.
        description: What it does, for the Kubeflow UI.
        steps: Names of its tasks, which a profile may give settings of their own.
        inputs: What a run is given.
        chain: Makes the tasks from the inputs' values by name and the number of pods that share preprocess.
    """

    name: str
    display_name: str
    description: str
    steps: tuple[str, ...]
    inputs: tuple[Input, ...]
    chain: Callable[[Mapping[str, Any], int], None]

    def build(self, partitions: int = 1) -> GraphComponent:
        """The pipeline as kfp knows it.

        Args:
            partitions: Pods that prepare a part of the data each, before preprocess itself adds the manifest. The
                number is fixed when the pipeline is built, so that the usual pipeline has no loop in its graph.
        """

        def pipeline(*values: Any) -> None:
            self.chain(dict(zip([item.name for item in self.inputs], values, strict=True)), partitions)
            _choose_container_images()

        pipeline.__signature__ = inspect.Signature([_parameter(item) for item in self.inputs])  # type: ignore[attr-defined]
        pipeline.__doc__ = "\n".join(
            [f"{self.description}\n\nArgs:", *(f"    {item.name}: {item.help}" for item in self.inputs)]
        )
        decorate = dsl.pipeline(name=self.name, display_name=self.display_name, description=self.description)
        component: GraphComponent = decorate(pipeline)
        return component

    def write(self, path: Path, partitions: int = 1) -> Path:
        """Write the pipeline as the YAML file that Kubeflow Pipelines takes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(self.build(partitions), str(path))
        return path


def taken_by(component: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a component declares, by name."""
    return {name: value for name, value in inputs.items() if name in component.component_spec.inputs}


def set_run_id(*tasks: dsl.PipelineTask) -> None:
    """Give tasks the run's id, which ties a step's MLflow run to its pipeline run, also on a retry."""
    for task in tasks:
        kubernetes.use_field_path_as_env(task, environment.PIPELINE_RUN_ID.name, "metadata.labels['pipeline/runid']")


def _parameter(item: Input) -> inspect.Parameter:
    default = inspect.Parameter.empty if item.default is REQUIRED else item.default
    return inspect.Parameter(item.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=item.type)


def _choose_container_images() -> None:
    for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        # A pipeline used as a task has no container of its own.
        if task.container_spec is not None:
            task.set_container_image(container_images.chosen(task.container_spec.image))
