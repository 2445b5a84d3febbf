"""The KFP interface of merge."""

from kfp import dsl

from minicpmv_finetune.container_images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def merge(
    base_model_uri: str,
    adapter: dsl.Input[dsl.Model],
    shards: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Merge the adapter into the base model, and check on real samples that the logits remain the same.

    Args:
        base_model_uri: Base checkpoint that the adapter was trained on; a path, s3:// URI or hub id.
        adapter: The output of the train step.
        shards: The prepared samples; the parity check uses some of them.
        model: A Hugging Face checkpoint folder, a drop-in replacement for the base model.
        report: JSON report: the change of each part of the model, and the largest difference of logits.
        metrics: The numbers of the report.
        summary: The report as a table.
    """
    from pathlib import Path

    from minicpmv_finetune.components.merge.merge import MergeSettings, markdown
    from minicpmv_finetune.components.merge.merge import merge as run
    from minicpmv_finetune.permanent_errors import permanent_error_marked

    inputs = {"base_model_uri": base_model_uri, "adapter": adapter.uri, "shards": shards.uri}
    with permanent_error_marked(model.uri, inputs):
        found = run(
            base_model_uri,
            Path(adapter.path),
            Path(shards.path),
            Path(model.path),
            Path(report.path),
            MergeSettings(),
        )
        # Only named keys: the adapter's metadata also contains Kubeflow's own, such as the name that the UI displays.
        for key in ("generation", "base_model", "use_lora"):
            if key in adapter.metadata:
                model.metadata[key] = adapter.metadata[key]
        model.metadata.update(adapter_uri=adapter.uri, display_name="merged model")
        for name, value in found.metrics.items():
            metrics.log_metric(name, value)
        Path(summary.path).write_text(markdown(found))
