"""The KFP interface of notify."""

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def notify(status: dsl.PipelineTaskFinalStatus, pipeline: str, run_summary: dsl.Output[dsl.Markdown]) -> None:
    """Say how a run ended: on this step's page, in MLflow, and to a webhook if MINICPMV_FINETUNE_WEBHOOK_URL is set.

    Args:
        status: Final status of the run in Kubeflow.
        pipeline: Name of the pipeline.
        run_summary: How the run ended, with the sentence of a step that failed, and a link to the run in MLflow.
    """
    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.notify.notify import describe_end, post
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.tracking.step_runs import end_pipeline_run, link_to_run

    def work() -> None:
        end = describe_end(pipeline, status.state, status.error_message or "", run_summary.uri)
        write_summary(run_summary.path, end.markdown() + link_to_run())
        end_pipeline_run(end.tracked_status, end.result or end.state.lower(), end.description)
        post(end)

    run_step("notify", run_summary.uri, {"pipeline": pipeline, "state": status.state}, work)
