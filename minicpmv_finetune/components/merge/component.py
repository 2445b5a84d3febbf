"""The KFP interface of merge."""

from kfp import dsl

from minicpmv_finetune.container_images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def merge(
    base_model_uri: str,
    adapter: dsl.Input[dsl.Model],
    shards: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    merge_summary: dsl.Output[dsl.Markdown],
    merge_report: dsl.Output[dsl.HTML],
) -> None:
    """Merge the adapter into the base model, and check on real samples that the logits remain the same.

    Args:
        base_model_uri: Base checkpoint that the adapter was trained on; a path, s3:// URI or hub id.
        adapter: The output of the train step.
        shards: The prepared samples; the parity check uses some of them.
        model: A Hugging Face checkpoint folder, a drop-in replacement for the base model; beside it in the store,
            merge-report.json contains the numbers of the report, also of every tensor.
        merge_summary: The most important numbers of the report as a table.
        merge_report: The change of each part of the model, the largest difference of logits, and generated answers.
    """
    from pathlib import Path

    from minicpmv_finetune import storage
    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.merge.merge import MergeSettings, markdown
    from minicpmv_finetune.components.merge.merge import merge as run
    from minicpmv_finetune.components.merge.page import page_written
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.tracking.step_runs import link_to_run

    inputs = {"base_model_uri": base_model_uri, "adapter": adapter.uri, "shards": shards.uri}

    def work() -> None:
        with (
            storage.kept_beside(model.uri, model.path, "merge-report.json") as report,
            page_written(report, Path(merge_report.path)),
        ):
            found = run(
                base_model_uri, Path(adapter.path), Path(shards.path), Path(model.path), report, MergeSettings()
            )
            # Only named keys: the metadata also contains Kubeflow's own, such as the name that the UI displays.
            for key in ("generation", "base_model", "use_lora"):
                if key in adapter.metadata:
                    model.metadata[key] = adapter.metadata[key]
            model.metadata.update(adapter_uri=adapter.uri, display_name="merged model")
            write_summary(merge_summary.path, markdown(found) + link_to_run("merge"))

    run_step("merge", model.uri, inputs, work)
