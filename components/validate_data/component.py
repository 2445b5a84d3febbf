"""The KFP interface of validate_data."""

from kfp import dsl

from ..images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def validate_data(
    data_uri: str,
    eval_data_uri: str,
    max_reject_ratio: float,
    eval_fraction: float,
    seed: int,
    dataset: dsl.Output[dsl.Dataset],
    rejects: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Check every sample, name the ones left out, and split off evaluation data if none is given.

    Args:
        data_uri: Training data in MiniCPM-V's JSON format (array or JSON Lines), a path or s3:// URI.
        eval_data_uri: Evaluation data in the same format; empty splits it off the training data, by picture.
        max_reject_ratio: Share of rejected samples above which the step fails.
        eval_fraction: Share of the pictures split off for evaluation when eval_data_uri is empty.
        seed: Decides which pictures are split off.
        dataset: The accepted samples.
        rejects: JSON Lines naming each rejected sample, with a reason code and a sentence.
        metrics: Counts of accepted and rejected samples.
        summary: The same as a table.
    """
    from pathlib import Path

    from minicpmv_finetune.components.attempt import permanent_error_marked
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings, markdown
    from minicpmv_finetune.components.validate_data.validate import validate_data as run

    settings = ValidationSettings(max_reject_ratio=max_reject_ratio, eval_fraction=eval_fraction, seed=seed)
    inputs = {"data_uri": data_uri, "eval_data_uri": eval_data_uri, "settings": settings}
    with permanent_error_marked(dataset.uri, inputs):
        info = run(data_uri, eval_data_uri, Path(dataset.path), Path(rejects.path), settings)
        dataset.metadata.update(fingerprint=info.fingerprint, **info.rows)
        for split, rows in info.rows.items():
            metrics.log_metric(f"{split}_samples", rows)
        for reason, count in info.rejected.items():
            metrics.log_metric(f"rejected_{reason}", count)
        Path(summary.path).write_text(markdown(info))
