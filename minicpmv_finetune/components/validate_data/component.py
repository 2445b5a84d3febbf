"""The KFP interface of validate_data."""

from typing import Any

from kfp import dsl

from minicpmv_finetune.container_images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def validate_data(
    data_uri: str,
    eval_data_uri: str,
    max_reject_ratio: float,
    seed: int,
    data_options: dict[str, Any],
    registered_model: str,
    dataset: dsl.Output[dsl.Dataset],
    rejects: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Check every sample, list the rejected ones, and split off evaluation data if none is given.

    Args:
        data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI, or a pattern.
        eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by image.
        max_reject_ratio: Share of rejected samples above which the step fails.
        seed: Seed of the split.
        data_options: eval_fraction (0.1), the share of the images split off for evaluation when eval_data_uri is
            empty; exif_transpose (false), whether images are rotated as their EXIF orientation says.
        registered_model: Name in MLflow's model registry; the step first checks that its champion can be read.
        dataset: The accepted samples.
        rejects: JSON Lines with each rejected sample, a reason code and a sentence.
        metrics: Counts of accepted and rejected samples, and of noteworthy properties.
        summary: The same counts as a table.
        report: Counts, histograms, duplicates, and samples whose slices are drawn over the images.
    """
    from pathlib import Path

    from minicpmv_finetune.components.validate_data.report import markdown
    from minicpmv_finetune.components.validate_data.validate import settings_from
    from minicpmv_finetune.components.validate_data.validate import validate_data as run
    from minicpmv_finetune.permanent_errors import permanent_error_marked
    from minicpmv_finetune.tracking.registry import champion_to_beat

    options = {"max_reject_ratio": max_reject_ratio, "seed": seed, **data_options}
    inputs = {"data_uri": data_uri, "eval_data_uri": eval_data_uri, "options": options}
    with permanent_error_marked(dataset.uri, inputs):
        settings = settings_from(options)
        champion_to_beat(registered_model)
        info = run(data_uri, eval_data_uri, Path(dataset.path), Path(rejects.path), settings, Path(report.path))
        dataset.metadata.update(fingerprint=info.fingerprint, exif_transpose=info.exif_transpose, **info.rows)
        for split, rows in info.rows.items():
            metrics.log_metric(f"{split}_samples", rows)
        for kind, counts in {"rejected": info.rejected, "noted": info.noted}.items():
            for code, count in counts.items():
                metrics.log_metric(f"{kind}_{code}", count)
        Path(summary.path).write_text(markdown(info))
