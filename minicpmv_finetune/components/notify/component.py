"""The KFP interface of notify."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def notify(status: dsl.PipelineTaskFinalStatus, pipeline: str) -> None:
    """Post how a run went to the webhook that MINICPMV_FINETUNE_WEBHOOK_URL in the environment names, if it is set.

    Args:
        status: Kubeflow's word on the run.
        pipeline: Name of the pipeline.
    """
    from minicpmv_finetune.components.notify.notify import notify as run
    from minicpmv_finetune.errors import RetryableError, UserError, end_process

    try:
        run(pipeline, status.state, status.error_message or "")
    except (UserError, RetryableError) as error:
        end_process(error)
