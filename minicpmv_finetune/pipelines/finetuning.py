"""The pipeline: validate data → preprocess → train → merge → evaluate → register, if the gate lets the model through.

Its inputs are what a person fills in on the Kubeflow UI's run form, so each has a default that runs and a sentence that
helps. The defaults train LoRA adapters and the vision tower; `training_flags` reaches every other flag of the training
script.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from kfp import compiler, dsl, kubernetes
from kfp.compiler.compiler_utils import KubernetesManifestOptions
from kfp.dsl.graph_component import GraphComponent

from minicpmv_finetune import environment
from minicpmv_finetune.components.evaluate.component import evaluate
from minicpmv_finetune.components.merge.component import merge
from minicpmv_finetune.components.preprocess.component import preprocess, preprocess_part
from minicpmv_finetune.components.register.component import register
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.validate_data.component import validate_data
from minicpmv_finetune.kubeflow.profile import Profile, with_profile

PIPELINE_NAME = "minicpmv-finetune"
STEPS = ("validate-data", "preprocess", "train", "merge", "evaluate", "register")
DEFAULT_BASE = "openbmb/MiniCPM-V-4.6"
DEFAULT_NAME = "minicpmv-finetune"


def build(partitions: int = 1) -> Any:
    """The pipeline, with preprocess shared between some pods.

    Args:
        partitions: pods that prepare a part of the data each, before preprocess itself adds the manifest. How many is
            decided when the pipeline is compiled, so that the usual one has no loop in its graph.
    """

    @dsl.pipeline(
        name=PIPELINE_NAME,
        display_name="Fine-tune MiniCPM-V",
        description="From images with questions and answers to a merged model, compared with its base on new data.",
    )
    def finetune(
        data_uri: str,
        eval_data_uri: str = "",
        base_model_uri: str = DEFAULT_BASE,
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
        evaluation_options: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
        registered_model: str = DEFAULT_NAME,
    ) -> None:
        """Fine-tune MiniCPM-V on images with questions and answers.

        Args:
            data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI.
            eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by image.
            base_model_uri: Base checkpoint; a path, s3:// URI or hub id.
            max_slice_nums: Most slices of an image beside its overview; more show finer detail and cost more tokens.
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
            evaluation_options: Options of evaluate, such as {"max_new_tokens": 64, "gate": {"min_metric": 0.8}}.
            registered_model: Name in MLflow's registry for a model that passes the gate; empty registers none.
        """
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
        identify(validated)
        tune(
            validated.outputs["dataset"],
            base_model_uri=base_model_uri,
            preparing={
                "max_slice_nums": max_slice_nums,
                "model_max_length": model_max_length,
                "max_reject_ratio": max_reject_ratio,
            },
            training={
                "use_lora": use_lora,
                "tune_vision": tune_vision,
                "tune_llm": tune_llm,
                "lora_r": lora_r,
                "lora_alpha": lora_alpha,
                "learning_rate": learning_rate,
                "num_train_epochs": num_train_epochs,
                "per_device_train_batch_size": per_device_train_batch_size,
                "seed": seed,
                "training_flags": training_flags,
            },
            evaluating={"metric": metric, "evaluation_options": evaluation_options},
            registered_model=registered_model,
            partitions=partitions,
        )

    return finetune


def tune(
    dataset: Any,
    *,
    base_model_uri: Any,
    preparing: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluating: Mapping[str, Any],
    registered_model: Any,
    partitions: int = 1,
) -> None:
    """The tasks from a validated dataset to a registered model.

    Args:
        dataset: output of validate_data.
        base_model_uri: checkpoint that is tuned.
        preparing: further inputs of preprocess.
        training: further inputs of train.
        evaluating: further inputs of evaluate.
        registered_model: name in MLflow's registry.
        partitions: see `build`.
    """
    parts: Any = []
    if partitions > 1:
        with dsl.ParallelFor(list(range(partitions)), name="parts") as part:
            prepared_part = preprocess_part(
                dataset=dataset,
                base_model_uri=base_model_uri,
                max_slice_nums=preparing["max_slice_nums"],
                model_max_length=preparing["model_max_length"],
                part=part,
                num_parts=partitions,
            )
        parts = dsl.Collected(prepared_part.outputs["Output"])
    prepared = preprocess(dataset=dataset, base_model_uri=base_model_uri, parts=parts, **preparing)
    trained = train(shards=prepared.outputs["shards"], base_model_uri=base_model_uri, **training)
    merged = merge(
        base_model_uri=base_model_uri,
        adapter=trained.outputs["adapter"],
        shards=prepared.outputs["shards"],
    )
    evaluated = evaluate(
        model=merged.outputs["model"],
        base_model_uri=base_model_uri,
        dataset=dataset,
        registered_model=registered_model,
        **evaluating,
    )
    # What they answer depends on the registry too, of which Kubeflow's cache knows nothing.
    evaluated.set_caching_options(False)
    with dsl.If(evaluated.outputs["Output"] == "promote", name="passed-the-gate"):
        registered = register(verdict=evaluated.outputs["verdict"], registered_model=registered_model)
        registered.set_caching_options(False)
    identify(prepared, trained, merged, evaluated, registered)


def identify(*tasks: dsl.PipelineTask) -> None:
    """Give tasks the run's id, which ties a step's MLflow run to its pipeline run, also on a retry."""
    for task in tasks:
        kubernetes.use_field_path_as_env(task, environment.PIPELINE_RUN_ID.name, "metadata.labels['pipeline/runid']")


finetune = build()


def pipeline_for(profile: Profile) -> GraphComponent:
    """The pipeline with a cluster's settings on its tasks."""
    return with_profile(build(profile.preprocess_partitions), profile)


def compile_pipeline(path: Path, partitions: int = 1, profile: Profile | None = None) -> Path:
    """Write the pipeline as the YAML file that Kubeflow Pipelines takes.

    Args:
        path: receives it.
        partitions: see `build`; with a profile, the profile's count.
        profile: a cluster's settings, put on every task.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline_for(profile) if profile else build(partitions), str(path))
    return path


def compile_objects(path: Path, profile: Profile) -> Path:
    """Write the pipeline as `Pipeline` and `PipelineVersion` objects, for clusters that keep pipelines in Kubernetes.

    A version cannot be changed once it is applied, so its name holds a digest of its content.
    """
    component = pipeline_for(profile)
    options = KubernetesManifestOptions(
        pipeline_name=PIPELINE_NAME,
        pipeline_display_name=component.pipeline_spec.pipeline_info.display_name,
        pipeline_version_name=f"{PIPELINE_NAME}-{content_digest(component)}",
        namespace=profile.namespace,
        include_pipeline_manifest=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        component, str(path), kubernetes_manifest_format=True, kubernetes_manifest_options=options
    )
    return path


def content_digest(pipeline: GraphComponent) -> str:
    """Twelve hexadecimal digits that change when the pipeline or its cluster's settings do."""
    content = [MessageToDict(pipeline.pipeline_spec), MessageToDict(pipeline.platform_spec)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
