"""The KFP interface of notify."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def notify(status: dsl.PipelineTaskFinalStatus, pipeline: str) -> None:
    """Post the outcome of a run to the webhook in the variable MINICPMV_FINETUNE_WEBHOOK_URL, if it is set.

    Args:
        status: Final status of the run in Kubeflow.
        pipeline: Name of the pipeline.
    """
    from minicpmv_finetune.components.notify.notify import notify as run
    from minicpmv_finetune.errors import RetryableError, UserError, end_process

    try:
        run(pipeline, status.state, status.error_message or "")
    except (UserError, RetryableError) as error:
        end_process(error)
