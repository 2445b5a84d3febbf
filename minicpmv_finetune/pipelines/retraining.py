"""The pipeline for schedules: fine-tune again when there is new data, and promote what beats the champion.

    validate data → plan retraining ──nothing new──▶ done
                                    └─something new─▶ preprocess → train → merge → evaluate → register

Data that equals the champion's ends the run successfully before any GPU is requested. Whatever happens, the last task
posts the outcome to a webhook, whose address comes from the Secret `minicpmv-webhook` (key `url`) where the namespace
has one.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl, kubernetes

from minicpmv_finetune import environment
from minicpmv_finetune.components.notify.component import notify
from minicpmv_finetune.components.plan_retraining.component import plan_retraining

from .finetuning import tune, validated
from .inputs import FINETUNE_INPUTS, RETRAIN_INPUTS, defaults
from .pipeline import Pipeline, set_run_id, taken_by

NAME = "minicpmv-retrain"
WEBHOOK_SECRET = "minicpmv-webhook"


def _retrain(inputs: Mapping[str, Any], partitions: int) -> None:
    notified = notify(pipeline=NAME)
    notified.set_caching_options(False)
    kubernetes.use_secret_as_env(notified, WEBHOOK_SECRET, {"url": environment.WEBHOOK_URL.name}, optional=True)
    with dsl.ExitHandler(notified, name="tell-the-outcome"):
        dataset = validated(inputs)
        planned = plan_retraining(dataset=dataset, **taken_by(plan_retraining, inputs))
        planned.set_caching_options(False)
        with dsl.If(planned.outputs["Output"] == "something new", name="something-new"):
            # What is no input here is trained with the other pipeline's defaults; the flags win over each of them.
            training = {**defaults(FINETUNE_INPUTS), **inputs, "training_flags": planned.outputs["flags"]}
            tune(dataset, training, partitions)
    set_run_id(notified, planned)


RETRAIN = Pipeline(
    name=NAME,
    display_name="Fine-tune MiniCPM-V again",
    description="For schedules: does nothing without new data; promotes a model that beats the champion, and reports.",
    steps=("validate-data", "plan-retraining", "preprocess", "train", "merge", "evaluate", "register", "notify"),
    inputs=RETRAIN_INPUTS,
    chain=_retrain,
)


def __getattr__(name: str) -> Any:
    """`retrain`, as `finetune` in the module beside."""
    if name == "retrain":
        return RETRAIN.build()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
