"""A pipeline as a value: its name, its steps, its inputs, and the function that adds its tasks.

All code that handles pipelines (compile, submit, schedule, clean-up, local run, documentation) takes such a value, so
that it does not depend on how many pipelines there are or what they do.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes
from kfp.dsl import pipeline_context
from kfp.dsl.graph_component import GraphComponent

from minicpmv_finetune import container_images, environment
from minicpmv_finetune.components.notify.component import notify
from minicpmv_finetune.inputs.table import INPUTS, REQUIRED, Input
from minicpmv_finetune.kubernetes_terms import RUN_LABEL
from minicpmv_finetune.reports.markdown import with_code

_DOCUMENTATION = "More: `docs/inputs.md`, `docs/kubeflow-ui.md`."

WEBHOOK_SECRET = "minicpmv-webhook"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of this project.

    Attributes:
        name: Name of the pipeline on a server, and of its artifacts' folder below the pipeline root.
        display_name: Title of the pipeline in the Kubeflow UI.
        description: What the pipeline does, for the Kubeflow UI.
        steps: Names of its tasks; a profile may contain settings for each.
        inputs: Inputs of a run.
        add_tasks: Function that adds the tasks, given the inputs' values by name and the number of pods that share
            preprocess.
    """

    name: str
    display_name: str
    description: str
    steps: tuple[str, ...]
    inputs: tuple[Input, ...]
    add_tasks: Callable[[Mapping[str, Any], int], None]

    @property
    def guide(self) -> str:
        """The description with a line for each input, in groups: the UI's form has no help, and sorts by name."""
        lines = [self.description]
        for group in dict.fromkeys(item.group for item in INPUTS.values()):
            if rows := [item for item in self.inputs if item.group == group]:
                lines += ["", f"**{group.capitalize()}**", "", *map(_guide_line, rows)]
        return "\n".join([*lines, "", _DOCUMENTATION])

    def build(self, partitions: int = 1, with_report: bool = True) -> GraphComponent:
        """Build kfp's representation of the pipeline.

        Its last task says how the run ended, whatever happened, and posts it to a webhook; the webhook's address comes
        from the Secret `minicpmv-webhook` (key `url`), if the namespace has one.

        Args:
            partitions: Number of pods that each prepare a part of the data, before preprocess itself adds the
                manifest. It is fixed when the pipeline is built, so that the usual pipeline has no loop in its graph.
            with_report: Whether it has this last task; a run on this machine tells its user itself.
        """

        def pipeline(*values: Any) -> None:
            given = dict(zip([item.name for item in self.inputs], values, strict=True))
            with _reported(self.name) if with_report else nullcontext():
                self.add_tasks(given, partitions)
            _choose_container_images()

        pipeline.__signature__ = inspect.Signature([_parameter(item) for item in self.inputs])  # type: ignore[attr-defined]
        pipeline.__doc__ = "\n".join(
            [f"{self.description}\n\nArgs:", *(f"    {item.name}: {item.help}" for item in self.inputs)]
        )
        decorate = dsl.pipeline(name=self.name, display_name=self.display_name, description=self.guide)
        component: GraphComponent = decorate(pipeline)
        _add_choices(component, self.inputs)
        return component

    def write(self, path: Path, partitions: int = 1) -> Path:
        """Write the pipeline as the YAML file that Kubeflow Pipelines reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        compiler.Compiler().compile(self.build(partitions), str(path))
        return path


def copy_choices(source: GraphComponent, target: GraphComponent) -> None:
    """Give a pipeline the choices that another one with the same inputs has."""
    parameters = source.pipeline_spec.root.input_definitions.parameters
    for name, parameter in target.pipeline_spec.root.input_definitions.parameters.items():
        del parameter.literals[:]
        parameter.literals.extend(parameters[name].literals)


@contextmanager
def _reported(pipeline: str) -> Iterator[None]:
    """Add the task that says how the run ended, after the tasks that the block adds."""
    task = notify(pipeline=pipeline)
    task.set_caching_options(False)
    set_run_id(task)
    kubernetes.use_secret_as_env(task, WEBHOOK_SECRET, {"url": environment.WEBHOOK_URL.name}, optional=True)
    with dsl.ExitHandler(task, name=pipeline.removeprefix("minicpmv-")):
        yield


def inputs_of(component: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a component declares, by name."""
    return {name: value for name, value in inputs.items() if name in component.component_spec.inputs}


def set_run_id(*tasks: dsl.PipelineTask) -> None:
    """Pass the run's id to tasks; it connects a step's MLflow run with its pipeline run, also after a retry."""
    for task in tasks:
        kubernetes.use_field_path_as_env(task, environment.PIPELINE_RUN_ID.name, f"metadata.labels['{RUN_LABEL}']")


def _parameter(item: Input) -> inspect.Parameter:
    default = inspect.Parameter.empty if item.default is REQUIRED else item.default
    return inspect.Parameter(item.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=item.type)


def _add_choices(component: GraphComponent, inputs: tuple[Input, ...]) -> None:
    """Write the values of which a person chooses one, so that the form of the UI has a drop-down for them.

    The server refuses other values. kfp has no way to say this in Python, so it is set in what kfp compiled.
    """
    parameters = component.pipeline_spec.root.input_definitions.parameters
    for item in inputs:
        for choice in (True, False) if item.type is bool else item.choices:
            value = parameters[item.name].literals.add()
            if isinstance(choice, bool):
                value.bool_value = choice
            else:
                value.string_value = choice


def _guide_line(item: Input) -> str:
    # The UI's page of a pipeline cannot be scrolled to the top of a long description, where the first inputs are.
    help_text = item.help.partition(";")[0].rstrip(".")
    needed = " (required)" if item.default is REQUIRED else ""
    return f"- `{item.name}`{needed}: {with_code(help_text)}"


def _choose_container_images() -> None:
    for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        # A task that is itself a pipeline has no container.
        if task.container_spec is not None:
            task.set_container_image(container_images.chosen(task.container_spec.image))
