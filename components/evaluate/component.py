"""The KFP interface of evaluate."""

from kfp import dsl

from ..images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def evaluate(
    model: dsl.Input[dsl.Model],
    base_model_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    metric: str,
    max_new_tokens: int,
    batch_size: int,
    predictions: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Let base and merged model answer the evaluation split freely, and compare them sample by sample.

    Args:
        model: The merged model.
        base_model_uri: The model it is compared with; a path, s3:// URI or hub id.
        dataset: The samples of validate_data, of which the evaluation split is used.
        metric: How answers are scored, such as exact_match or anls.
        max_new_tokens: Longest answer in tokens.
        batch_size: Samples that are answered at once.
        predictions: JSON Lines of every question, expected answer and both models' answers.
        metrics: Scores of both models.
        summary: The same as a table.
        report: Pictures, questions and answers side by side, with filters.
    """
    from pathlib import Path

    from minicpmv_finetune.components.attempt import permanent_error_marked
    from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings
    from minicpmv_finetune.components.evaluate.evaluate import evaluate as run
    from minicpmv_finetune.components.evaluate.report import markdown

    settings = EvaluationSettings(metric=metric, max_new_tokens=max_new_tokens, batch_size=batch_size)
    inputs = {"model": model.uri, "base_model_uri": base_model_uri, "dataset": dataset.uri, "settings": settings}
    with permanent_error_marked(predictions.uri, inputs):
        result = run(
            Path(model.path),
            base_model_uri,
            Path(dataset.path),
            Path(predictions.path),
            Path(report.path),
            settings,
        )
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        Path(summary.path).write_text(markdown(result))
