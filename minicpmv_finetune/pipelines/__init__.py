"""The pipelines, their run on this machine, and the demonstration.

`from minicpmv_finetune.pipelines import finetune, retrain` imports the pipelines for the kfp SDK. Only this import
loads kfp and builds a pipeline, so that the command line starts at once.
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
    component = pipeline_of(name).build()  # type: ignore[arg-type]
    globals()[name] = component
    return component
