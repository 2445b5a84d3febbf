"""The KFP interface of register."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(
    promotion_record: dsl.Input[dsl.Artifact], registered_model: str, registration: dsl.Output[dsl.Markdown]
) -> None:
    """Register a model that passed the gate in MLflow, and make it champion if it beat the current champion.

    Args:
        promotion_record: The record of evaluate; it contains the model's address, and the model is not copied.
        registered_model: Name in MLflow's model registry; empty registers nothing, and the result says so.
        registration: The result and its reason, with links to the version and the run in MLflow.
    """
    from pathlib import Path

    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.register.register import register as run
    from minicpmv_finetune.reports.markdown import escape, write_summary
    from minicpmv_finetune.tracking.registry import link_to_newest
    from minicpmv_finetune.tracking.step_runs import link_to_run

    def work() -> None:
        sentence = run(Path(promotion_record.path), registered_model)
        links = link_to_newest(registered_model) + link_to_run("register")
        write_summary(registration.path, f"{escape(sentence[0].upper() + sentence[1:])}.\n{links}")

    run_step(
        "register",
        registration.uri,
        {"promotion_record": promotion_record.uri, "registered_model": registered_model},
        work,
    )
