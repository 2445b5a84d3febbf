"""The KFP interface of preprocess."""

from kfp import dsl

from ..images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def preprocess(
    dataset: dsl.Input[dsl.Dataset],
    base_model_uri: str,
    max_slice_nums: int,
    model_max_length: int,
    max_reject_ratio: float,
    shards: dsl.Output[dsl.Dataset],
    rejects: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Slice every picture and tokenise every conversation once, so that no epoch does it again.

    Args:
        dataset: The accepted samples of validate_data.
        base_model_uri: Base checkpoint whose template, tokenizer and slicing apply; a path, s3:// URI or hub id.
        max_slice_nums: Most slices of a picture beside its overview.
        model_max_length: Longest sample in tokens; a longer one is rejected with its length, never cut.
        max_reject_ratio: Share of rejected samples above which the step fails.
        shards: Parquet files with a manifest.
        rejects: JSON Lines naming each rejected sample, with a reason code and a sentence.
        metrics: Counts of samples, slices and tokens.
        summary: The same as a table.
    """
    from pathlib import Path

    from minicpmv_finetune.components.attempt import permanent_error_marked
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, markdown
    from minicpmv_finetune.components.preprocess.preprocess import preprocess as run

    settings = PreprocessSettings(
        max_slice_nums=max_slice_nums, model_max_length=model_max_length, max_reject_ratio=max_reject_ratio
    )
    inputs = {"dataset": dataset.uri, "base_model_uri": base_model_uri, "settings": settings}
    with permanent_error_marked(shards.uri, inputs):
        manifest = run(Path(dataset.path), base_model_uri, Path(shards.path), Path(rejects.path), settings)
        shards.metadata.update(
            generation=manifest.generation, fingerprint=manifest.data_fingerprint, bytes=manifest.bytes
        )
        for split, lengths in manifest.lengths.items():
            metrics.log_metric(f"{split}_samples", len(lengths))
            metrics.log_metric(f"{split}_slices", manifest.slices[split])
            metrics.log_metric(f"{split}_tokens", sum(lengths))
        Path(summary.path).write_text(markdown(manifest))
