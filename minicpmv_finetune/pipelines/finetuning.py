"""The pipeline: validate data → preprocess → train → merge → evaluate → register, if the model passes the gate.

A person fills in its inputs on the run form of the Kubeflow UI, so each has a working default (`inputs/table.py`). The
defaults train LoRA adapters and the vision tower; `training_flags` sets every other flag of the training script.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from minicpmv_finetune.components.evaluate.component import evaluate
from minicpmv_finetune.components.merge.component import merge
from minicpmv_finetune.components.preprocess.component import preprocess, preprocess_part
from minicpmv_finetune.components.register.component import register
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.validate_data.component import validate_data
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS

from .pipeline import Pipeline, inputs_of, set_run_id


def _finetune(inputs: Mapping[str, Any], partitions: int) -> None:
    dataset = add_validation(inputs)
    add_tuning(dataset, inputs, partitions)


def add_validation(inputs: Mapping[str, Any]) -> Any:
    """Add the task that validates the data; returns its dataset."""
    task = validate_data(**inputs_of(validate_data, inputs))
    # Kubeflow's cache key contains only addresses, so data that was overwritten would be mistaken for the old data.
    task.set_caching_options(False)
    set_run_id(task)
    return task.outputs["dataset"]


def add_tuning(dataset: Any, inputs: Mapping[str, Any], partitions: int = 1) -> None:
    """Add the tasks from a validated dataset to a registered model.

    Args:
        dataset: Output of validate_data.
        inputs: Values by name; each step gets those that its component declares.
        partitions: See `Pipeline.build`.
    """
    parts: Any = []
    if partitions > 1:
        with dsl.ParallelFor(list(range(partitions)), name="parts") as part:
            prepared_part = preprocess_part(
                dataset=dataset, part=part, num_parts=partitions, **inputs_of(preprocess_part, inputs)
            )
        parts = dsl.Collected(prepared_part.outputs["Output"])
    prepared = preprocess(dataset=dataset, parts=parts, **inputs_of(preprocess, inputs))
    trained = train(shards=prepared.outputs["shards"], **inputs_of(train, inputs))
    merged = merge(adapter=trained.outputs["adapter"], shards=prepared.outputs["shards"], **inputs_of(merge, inputs))
    evaluated = evaluate(model=merged.outputs["model"], dataset=dataset, **inputs_of(evaluate, inputs))
    # The outcome also depends on the registry, which is not part of Kubeflow's cache key.
    evaluated.set_caching_options(False)
    with dsl.If(evaluated.outputs["decision"] == "promote", name="register-if-better"):
        registered = register(promotion_record=evaluated.outputs["promotion_record"], **inputs_of(register, inputs))
        registered.set_caching_options(False)
    set_run_id(prepared, trained, merged, evaluated, registered)


FINETUNE = Pipeline(
    name="minicpmv-finetune",
    display_name="Fine-tune MiniCPM-V",
    description="From images with questions and answers to a merged model, compared with its base on new data.",
    steps=("validate-data", "preprocess", "train", "merge", "evaluate", "register", "notify"),
    inputs=FINETUNE_INPUTS,
    add_tasks=_finetune,
)


def __getattr__(name: str) -> Any:
    """The pipeline `finetune`, which the README of 0.1.0 imported from this module."""
    if name == "finetune":
        from . import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
