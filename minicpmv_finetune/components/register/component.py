"""The KFP interface of register."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(verdict: dsl.Input[dsl.Artifact], registered_model: str, summary: dsl.Output[dsl.Markdown]) -> None:
    """Register a model that passed the gate in MLflow, and make it champion if it has beaten the present one.

    Args:
        verdict: What evaluate found; only its address stands for the model, which is not moved.
        registered_model: Name in MLflow's model registry.
        summary: What happened, and why.
    """
    from pathlib import Path

    from minicpmv_finetune.components.register.register import register as run
    from minicpmv_finetune.permanent_errors import permanent_error_marked

    with permanent_error_marked(summary.uri, {"verdict": verdict.uri, "registered_model": registered_model}):
        sentence = run(Path(verdict.path), registered_model)
        Path(summary.path).write_text(f"{sentence}.\n")
