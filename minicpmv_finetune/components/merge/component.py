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
    """Merge the adapter into the base model, and prove on real samples that the result is both.

    Args:
        base_model_uri: Base checkpoint the adapter was trained on; a path, s3:// URI or hub id.
        adapter: The train step's result.
        shards: The prepared samples; some of them are used for the proof.
        model: A Hugging Face checkpoint folder, a drop-in for the base model.
        report: JSON of the proof: which modules moved by how much, and the largest difference of logits.
        metrics: The figures of the proof.
        summary: The same as a table.
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
        model.metadata.update(adapter.metadata, adapter_uri=adapter.uri)
        for name, value in found.metrics.items():
            metrics.log_metric(name, value)
        Path(summary.path).write_text(markdown(found))
