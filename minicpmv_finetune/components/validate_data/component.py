"""The KFP interface of validate_data."""

from typing import Any

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def validate_data(
    data_uri: str,
    eval_data_uri: str,
    max_reject_ratio: float,
    seed: int,
    data_options: dict[str, Any],
    registered_model: str,
    dataset: dsl.Output[dsl.Dataset],
    data_summary: dsl.Output[dsl.Markdown],
    data_report: dsl.Output[dsl.HTML],
    base_model_uri: str = "",
    max_slice_nums: int = 9,
    model_max_length: int = 2048,
    use_lora: bool = True,
    tune_vision: bool = True,
    tune_llm: bool = False,
    lora_r: int = 64,
    lora_alpha: int = 64,
    learning_rate: float = 1e-4,
    num_train_epochs: float = 3.0,
    per_device_train_batch_size: int = 4,
    training_flags: dict[str, Any] = {},  # noqa: B006 - kfp copies it into the compiled pipeline
    start_from: str = "",
    metric: str = "exact_match",
    evaluation_options: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Check the inputs of the whole run and every sample; split off evaluation data if none is given.

    A run that was started in the Kubeflow UI was not checked by the command line before. So this step gets the inputs
    of the later steps too, and one sentence names all mistakes before a GPU is requested.

    Args:
        data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI, or a pattern.
        eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by image.
        max_reject_ratio: Share of rejected samples above which the step fails.
        seed: Seed of the split.
        data_options: eval_fraction (0.1), the share of the images split off for evaluation when eval_data_uri is
            empty; exif_transpose (false), whether images are rotated as their EXIF orientation says.
        registered_model: Name in MLflow's model registry; the step first checks that its champion can be read.
        dataset: The accepted samples; beside it in the store, rejects.jsonl lists every rejected sample.
        data_summary: Counts of accepted and rejected samples, with the reasons and noteworthy properties.
        data_report: Counts, rejected samples, histograms, duplicates, and samples with their slices.
        base_model_uri: Base checkpoint of the later steps; empty if this step is not to check it.
        max_slice_nums: Only checked here, like all inputs below; the default is the pipeline's.
        model_max_length: Most tokens of a sample.
        use_lora: Whether LoRA adapters are trained.
        tune_vision: Whether the vision tower is trained.
        tune_llm: Whether the language model's own weights are trained.
        lora_r: Rank of the adapters.
        lora_alpha: Scale of the adapters.
        learning_rate: Peak learning rate.
        num_train_epochs: Number of passes over the training data.
        per_device_train_batch_size: Samples that a device processes at once.
        training_flags: Further flags of the training script by name.
        start_from: base or champion; empty in a pipeline that has no such input.
        metric: Metric that scores the answers.
        evaluation_options: Options of evaluate.
    """
    # First of all, while nothing but the inputs has a name here.
    given = dict(locals())
    from pathlib import Path

    from minicpmv_finetune import storage
    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.validate_data.report import markdown
    from minicpmv_finetune.components.validate_data.validate import settings_from
    from minicpmv_finetune.components.validate_data.validate import validate_data as run
    from minicpmv_finetune.inputs.checks import check_in_first_step, inputs_among
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.tracking.registry import champion_to_beat
    from minicpmv_finetune.tracking.step_runs import link_to_run

    inputs = inputs_among(given)

    def work() -> None:
        with storage.kept_beside(dataset.uri, dataset.path, "rejects.jsonl") as rejects:
            check_in_first_step(inputs)
            settings = settings_from({"max_reject_ratio": max_reject_ratio, "seed": seed, **data_options})
            champion_to_beat(registered_model)
            info = run(data_uri, eval_data_uri, Path(dataset.path), rejects, settings, Path(data_report.path))
            dataset.metadata.update(fingerprint=info.fingerprint, exif_transpose=info.exif_transpose, **info.rows)
            write_summary(data_summary.path, markdown(info) + link_to_run("validate-data"))

    run_step("validate-data", dataset.uri, inputs, work)
