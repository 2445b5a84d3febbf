"""The pipelines, their run on this machine, and the demonstration.

`from minicpmv_finetune.pipelines import finetune, retrain` imports the pipelines for the kfp SDK, with the settings of
the profile that the environment names, else of the profile `kubeflow`, so that they run on a stock Kubeflow. Only this
import loads kfp and builds a pipeline, so that the command line starts at once.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

    from .pipeline import Pipeline

    finetune: GraphComponent
    retrain: GraphComponent


PipelineChoice = Literal["finetune", "retrain"]


def all_pipelines() -> "dict[PipelineChoice, Pipeline]":
    """Every pipeline by its short name."""
    from .finetuning import FINETUNE
    from .retraining import RETRAIN

    return {"finetune": FINETUNE, "retrain": RETRAIN}


def pipeline_of(choice: PipelineChoice) -> "Pipeline":
    """The pipeline with this short name."""
    return all_pipelines()[choice]


def __getattr__(name: str) -> Any:
    if name not in ("finetune", "retrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The one import from a layer above: these names are published, and a pipeline without settings runs nowhere.
    from minicpmv_finetune.kubeflow.compiling import pipeline_for
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    component = pipeline_for(pipeline_of(name), chosen_profile())  # type: ignore[arg-type]
    globals()[name] = component
    return component
