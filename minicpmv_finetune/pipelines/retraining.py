"""The pipeline for schedules: fine-tune again when there is new data, and promote what beats the champion.

    validate data → plan retraining ──nothing new──▶ done
                                    └─something new─▶ preprocess → train → merge → evaluate → register

Data that equals the champion's ends the run green before any GPU is claimed. Whatever happens, the last task posts the
outcome to a webhook, whose address comes from the Secret `minicpmv-webhook` (key `url`) where the namespace has one.
"""

from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes

from minicpmv_finetune import environment
from minicpmv_finetune.components.notify.component import notify
from minicpmv_finetune.components.plan_retraining.component import plan_retraining
from minicpmv_finetune.components.validate_data.component import validate_data
from minicpmv_finetune.kubeflow.profile import Profile, with_profile

from .finetuning import DEFAULT_BASE, DEFAULT_NAME, identify, tune

PIPELINE_NAME = "minicpmv-retrain"
WEBHOOK_SECRET = "minicpmv-webhook"
STEPS = ("validate-data", "plan-retraining", "preprocess", "train", "merge", "evaluate", "register", "notify")
# As the pipeline for single runs has them; training_flags wins over each.
_TRAINING = {
    "use_lora": True,
    "tune_vision": True,
    "tune_llm": False,
    "lora_r": 64,
    "lora_alpha": 64,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
}


def build(partitions: int = 1) -> Any:
    """The pipeline, with preprocess shared between some pods."""

    @dsl.pipeline(
        name=PIPELINE_NAME,
        display_name="Fine-tune MiniCPM-V again",
        description="For schedules: nothing without new data; promotes what beats the champion, and tells someone.",
    )
    def retrain(
        data_uri: str,
        eval_data_uri: str = "",
        base_model_uri: str = DEFAULT_BASE,
        registered_model: str = DEFAULT_NAME,
        start_from: str = "base",
        max_slice_nums: int = 9,
        model_max_length: int = 2048,
        max_reject_ratio: float = 0.05,
        data_options: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
        training_flags: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
        seed: int = 42,
        metric: str = "exact_match",
        evaluation_options: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
    ) -> None:
        """Fine-tune MiniCPM-V when the data is new.

        Args:
            data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI.
            eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by image.
            base_model_uri: Base checkpoint; a path, s3:// URI or hub id.
            registered_model: Name in MLflow's registry, whose champion is to be beaten.
            start_from: base, or champion to go on from the champion's adapter.
            max_slice_nums: Most slices of an image beside its overview; more show finer detail and cost more tokens.
            model_max_length: Longest sample in tokens; a longer one is rejected with its length, never cut.
            max_reject_ratio: Share of rejected samples above which a step fails.
            data_options: Further options of the data by name, such as {"eval_fraction": 0.2, "exif_transpose": true}.
            training_flags: Any flag of the training script by name, such as {"lora_r": 16, "num_train_epochs": 1}.
            seed: Decides the evaluation split, the initial adapters and the order of samples.
            metric: How answers are scored, such as exact_match or anls.
            evaluation_options: Options of evaluate, such as {"max_new_tokens": 64, "gate": {"min_metric": 0.8}}.
        """
        told = notify(pipeline=PIPELINE_NAME)
        told.set_caching_options(False)
        kubernetes.use_secret_as_env(told, WEBHOOK_SECRET, {"url": environment.WEBHOOK_URL}, optional=True)
        with dsl.ExitHandler(told, name="tell-the-outcome"):
            validated = validate_data(
                data_uri=data_uri,
                eval_data_uri=eval_data_uri,
                max_reject_ratio=max_reject_ratio,
                seed=seed,
                data_options=data_options,
                registered_model=registered_model,
            )
            # Kubeflow's cache keys on addresses: data overwritten in place would be taken for the old one.
            validated.set_caching_options(False)
            planned = plan_retraining(
                dataset=validated.outputs["dataset"],
                base_model_uri=base_model_uri,
                registered_model=registered_model,
                start_from=start_from,
                training_flags=training_flags,
            )
            planned.set_caching_options(False)
            with dsl.If(planned.outputs["Output"] == "something new", name="something-new"):
                tune(
                    validated.outputs["dataset"],
                    base_model_uri=base_model_uri,
                    preparing={
                        "max_slice_nums": max_slice_nums,
                        "model_max_length": model_max_length,
                        "max_reject_ratio": max_reject_ratio,
                    },
                    training={**_TRAINING, "seed": seed, "training_flags": planned.outputs["flags"]},
                    evaluating={"metric": metric, "evaluation_options": evaluation_options},
                    registered_model=registered_model,
                    partitions=partitions,
                )
        identify(told, validated, planned)

    return retrain


retrain = build()


def compile_retraining(path: Path, partitions: int = 1, profile: Profile | None = None) -> Path:
    """Write the pipeline as the YAML file that Kubeflow Pipelines takes.

    Args:
        path: receives it.
        partitions: pods that share the work of preprocess; with a profile, the profile's count.
        profile: a cluster's settings, put on every task.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pipeline = with_profile(build(profile.preprocess_partitions), profile) if profile else build(partitions)
    compiler.Compiler().compile(pipeline, str(path))
    return path
