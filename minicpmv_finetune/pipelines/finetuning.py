"""The pipeline: validate data → preprocess → train → merge → evaluate → register, if the gate lets the model through.

Its inputs are what a person fills in on the Kubeflow UI's run form, so each has a default that runs and a sentence that
helps (`inputs.py`). The defaults train LoRA adapters and the vision tower; `training_flags` reaches every other flag of
the training script.
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

from .inputs import FINETUNE_INPUTS
from .pipeline import Pipeline, set_run_id, taken_by


def _finetune(inputs: Mapping[str, Any], partitions: int) -> None:
    dataset = validated(inputs)
    tune(dataset, inputs, partitions)


def validated(inputs: Mapping[str, Any]) -> Any:
    """The task that validates the data; returns its dataset."""
    task = validate_data(**taken_by(validate_data, inputs))
    # Kubeflow's cache keys on addresses: data overwritten in place would be mistaken for the old data.
    task.set_caching_options(False)
    set_run_id(task)
    return task.outputs["dataset"]


def tune(dataset: Any, inputs: Mapping[str, Any], partitions: int = 1) -> None:
    """The tasks from a validated dataset to a registered model.

    Args:
        dataset: Output of validate_data.
        inputs: Values by name; each step takes those that its component declares.
        partitions: See `Pipeline.build`.
    """
    parts: Any = []
    if partitions > 1:
        with dsl.ParallelFor(list(range(partitions)), name="parts") as part:
            prepared_part = preprocess_part(
                dataset=dataset, part=part, num_parts=partitions, **taken_by(preprocess_part, inputs)
            )
        parts = dsl.Collected(prepared_part.outputs["Output"])
    prepared = preprocess(dataset=dataset, parts=parts, **taken_by(preprocess, inputs))
    trained = train(shards=prepared.outputs["shards"], **taken_by(train, inputs))
    merged = merge(adapter=trained.outputs["adapter"], shards=prepared.outputs["shards"], **taken_by(merge, inputs))
    evaluated = evaluate(model=merged.outputs["model"], dataset=dataset, **taken_by(evaluate, inputs))
    # The outcome depends on the registry too, which Kubeflow's cache does not see.
    evaluated.set_caching_options(False)
    with dsl.If(evaluated.outputs["Output"] == "promote", name="passed-the-gate"):
        registered = register(verdict=evaluated.outputs["verdict"], **taken_by(register, inputs))
        registered.set_caching_options(False)
    set_run_id(prepared, trained, merged, evaluated, registered)


FINETUNE = Pipeline(
    name="minicpmv-finetune",
    display_name="Fine-tune MiniCPM-V",
    description="From images with questions and answers to a merged model, compared with its base on new data.",
    steps=("validate-data", "preprocess", "train", "merge", "evaluate", "register"),
    inputs=FINETUNE_INPUTS,
    chain=_finetune,
)


def __getattr__(name: str) -> Any:
    """`finetune`, which the README of 0.1.0 imported from here."""
    if name == "finetune":
        return FINETUNE.build()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
