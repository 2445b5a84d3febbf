"""The pipeline: validate data → preprocess → train → merge → evaluate.

Its inputs are what a person fills in on the Kubeflow UI's run form, so each has a default that runs and a sentence that
helps. The defaults train LoRA adapters and the vision tower; `training_flags` reaches every other flag of the training
script.
"""

from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes

from ..components.evaluate.component import evaluate
from ..components.merge.component import merge
from ..components.preprocess.component import preprocess, preprocess_part
from ..components.tracking import RUN_ID_VARIABLE
from ..components.train.component import train
from ..components.validate_data.component import validate_data

PIPELINE_NAME = "minicpmv-finetune"
STEPS = ("validate-data", "preprocess", "train", "merge", "evaluate")


def build(partitions: int = 1) -> Any:
    """The pipeline, with preprocess shared between some pods.

    Args:
        partitions: pods that prepare a part of the data each, before preprocess itself adds the manifest. How many is
            decided when the pipeline is compiled, so that the usual one has no loop in its graph.
    """

    @dsl.pipeline(
        name=PIPELINE_NAME,
        display_name="Fine-tune MiniCPM-V",
        description="From pictures with questions and answers to a merged model, compared with its base on new data.",
    )
    def finetune(
        data_uri: str,
        eval_data_uri: str = "",
        base_model_uri: str = "openbmb/MiniCPM-V-4.6",
        max_slice_nums: int = 9,
        model_max_length: int = 2048,
        max_reject_ratio: float = 0.05,
        data_options: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
        use_lora: bool = True,
        tune_vision: bool = True,
        tune_llm: bool = False,
        lora_r: int = 64,
        lora_alpha: int = 64,
        learning_rate: float = 1e-4,
        num_train_epochs: float = 3.0,
        per_device_train_batch_size: int = 4,
        training_flags: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
        seed: int = 42,
        metric: str = "exact_match",
        max_new_tokens: int = 128,
        eval_batch_size: int = 16,
    ) -> None:
        """Fine-tune MiniCPM-V on pictures with questions and answers.

        Args:
            data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI.
            eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by picture.
            base_model_uri: Base checkpoint; a path, s3:// URI or hub id.
            max_slice_nums: Most slices of a picture beside its overview; more show finer detail and cost more tokens.
            model_max_length: Longest sample in tokens; a longer one is rejected with its length, never cut.
            max_reject_ratio: Share of rejected samples above which a step fails.
            data_options: Further options of the data by name, such as {"eval_fraction": 0.2, "exif_transpose": true}.
            use_lora: Train LoRA adapters on the language model.
            tune_vision: Train the vision tower too.
            tune_llm: Train the language model's own weights; needs use_lora false.
            lora_r: Rank of the adapters.
            lora_alpha: Scale of the adapters; their update is multiplied by alpha / r.
            learning_rate: Peak learning rate.
            num_train_epochs: How often every sample is seen.
            per_device_train_batch_size: Samples a device sees at once.
            training_flags: Any further flag of the training script by name, such as {"gradient_accumulation_steps": 4};
                "num_nodes" above 1 trains on so many nodes.
            seed: Decides the evaluation split, the initial adapters and the order of samples.
            metric: How answers are scored, such as exact_match or anls.
            max_new_tokens: Longest answer in tokens.
            eval_batch_size: Samples that are answered at once.
        """
        validated = validate_data(
            data_uri=data_uri,
            eval_data_uri=eval_data_uri,
            max_reject_ratio=max_reject_ratio,
            seed=seed,
            data_options=data_options,
        )
        parts: Any = []
        if partitions > 1:
            with dsl.ParallelFor(list(range(partitions)), name="parts") as part:
                prepared_part = preprocess_part(
                    dataset=validated.outputs["dataset"],
                    base_model_uri=base_model_uri,
                    max_slice_nums=max_slice_nums,
                    model_max_length=model_max_length,
                    part=part,
                    num_parts=partitions,
                )
            parts = dsl.Collected(prepared_part.outputs["Output"])
        prepared = preprocess(
            dataset=validated.outputs["dataset"],
            base_model_uri=base_model_uri,
            max_slice_nums=max_slice_nums,
            model_max_length=model_max_length,
            max_reject_ratio=max_reject_ratio,
            parts=parts,
        )
        trained = train(
            shards=prepared.outputs["shards"],
            base_model_uri=base_model_uri,
            use_lora=use_lora,
            tune_vision=tune_vision,
            tune_llm=tune_llm,
            lora_r=lora_r,
            lora_alpha=lora_alpha,
            learning_rate=learning_rate,
            num_train_epochs=num_train_epochs,
            per_device_train_batch_size=per_device_train_batch_size,
            seed=seed,
            training_flags=training_flags,
        )
        merged = merge(
            base_model_uri=base_model_uri,
            adapter=trained.outputs["adapter"],
            shards=prepared.outputs["shards"],
        )
        evaluated = evaluate(
            model=merged.outputs["model"],
            base_model_uri=base_model_uri,
            dataset=validated.outputs["dataset"],
            metric=metric,
            max_new_tokens=max_new_tokens,
            batch_size=eval_batch_size,
        )
        for task in (validated, prepared, trained, merged, evaluated):
            # The run's id ties a step's MLflow run to its pipeline run, also on a retry.
            kubernetes.use_field_path_as_env(task, RUN_ID_VARIABLE, "metadata.labels['pipeline/runid']")

    return finetune


finetune = build()


def compile_pipeline(path: Path, partitions: int = 1) -> Path:
    """Write the pipeline as the YAML file that Kubeflow Pipelines takes.

    Args:
        path: receives it.
        partitions: see `build`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build(partitions), str(path))
    return path
