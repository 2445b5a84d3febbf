"""The KFP interface of plan_retraining."""

from typing import Any

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def plan_retraining(
    dataset: dsl.Input[dsl.Dataset],
    base_model_uri: str,
    registered_model: str,
    start_from: str,
    training_flags: dict[str, Any],
    flags: dsl.OutputPath(dict),  # type: ignore[valid-type]
    decision: dsl.OutputPath(str),  # type: ignore[valid-type]
    retraining_plan: dsl.Output[dsl.Markdown],
) -> None:
    """Decide whether the data differs from the champion's data, and where training starts.

    Args:
        dataset: The samples of validate_data, whose fingerprint is compared.
        base_model_uri: Base checkpoint; a path, s3:// URI or hub id.
        registered_model: Name in MLflow's model registry.
        start_from: base, or champion to continue from the champion's adapter.
        training_flags: Any flag of the training script by name.
        flags: training_flags, and lora_weight_path if training continues from the champion.
        decision: something new, or nothing new.
        retraining_plan: The decision and its reason in a sentence, with a link to the champion in MLflow.
    """
    import json
    from pathlib import Path

    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.plan_retraining.planning import plan
    from minicpmv_finetune.reports.markdown import escape
    from minicpmv_finetune.tracking.registry import link_to_champion

    inputs = {"dataset": dataset.uri, "base_model_uri": base_model_uri, "start_from": start_from}

    def work() -> None:
        found = plan(Path(dataset.path), base_model_uri, registered_model, start_from, training_flags)
        Path(flags).write_text(json.dumps(found.flags))
        Path(decision).write_text("something new" if found.is_new else "nothing new")
        sentence = escape(found.sentence[0].upper() + found.sentence[1:])
        Path(retraining_plan.path).write_text(f"{sentence}.\n{link_to_champion(registered_model)}")

    run_step("plan-retraining", retraining_plan.uri, {**inputs, "registered_model": registered_model}, work)
