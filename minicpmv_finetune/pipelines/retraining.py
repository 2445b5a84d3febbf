"""The pipeline for schedules: fine-tune again when there is new data, and promote what beats the champion.

    validate data → plan retraining ──nothing new──▶ done
                                    └─something new─▶ preprocess → train → merge → evaluate → register

If the data equals the champion's training data, the run ends successfully before a GPU is requested.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from minicpmv_finetune.components.plan_retraining.component import plan_retraining
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, RETRAIN_INPUTS, defaults

from .finetuning import add_tuning, add_validation
from .pipeline import Pipeline, inputs_of, set_run_id

NAME = "minicpmv-retrain"


def _retrain(inputs: Mapping[str, Any], partitions: int) -> None:
    dataset = add_validation(inputs)
    planned = plan_retraining(dataset=dataset, **inputs_of(plan_retraining, inputs))
    planned.set_caching_options(False)
    set_run_id(planned)
    with dsl.If(planned.outputs["decision"] == "something new", name="train-if-new"):
        # Settings that are no inputs here have the other pipeline's defaults; the flags override all of them.
        training = {**defaults(FINETUNE_INPUTS), **inputs, "training_flags": planned.outputs["flags"]}
        add_tuning(dataset, training, partitions)


RETRAIN = Pipeline(
    name=NAME,
    display_name="Fine-tune MiniCPM-V again",
    description="For schedules: does nothing without new data; promotes a model that beats the champion, and reports.",
    steps=("validate-data", "plan-retraining", "preprocess", "train", "merge", "evaluate", "register", "notify"),
    inputs=RETRAIN_INPUTS,
    add_tasks=_retrain,
)


def __getattr__(name: str) -> Any:
    """The pipeline `retrain`, like `finetune` in `finetuning.py`."""
    if name == "retrain":
        from . import retrain

        return retrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
