"""The KFP interface of register."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(
    promotion_record: dsl.Input[dsl.Artifact], registered_model: str, summary: dsl.Output[dsl.Markdown]
) -> None:
    """Register a model that passed the gate in MLflow, and make it champion if it beat the current champion.

    Args:
        promotion_record: The record of evaluate; it contains the model's address, and the model is not copied.
        registered_model: Name in MLflow's model registry.
        summary: The result and its reason.
    """
    from pathlib import Path

    from minicpmv_finetune.components.register.register import register as run
    from minicpmv_finetune.permanent_errors import permanent_error_marked

    with permanent_error_marked(
        summary.uri, {"promotion_record": promotion_record.uri, "registered_model": registered_model}
    ):
        sentence = run(Path(promotion_record.path), registered_model)
        Path(summary.path).write_text(f"{sentence}.\n")
