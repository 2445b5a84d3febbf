"""The KFP interface of evaluate."""

from typing import Any

from kfp import dsl

from minicpmv_finetune.container_images import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def evaluate(
    model: dsl.Input[dsl.Model],
    base_model_uri: str,
    dataset: dsl.Input[dsl.Dataset],
    metric: str,
    evaluation_options: dict[str, Any],
    registered_model: str,
    predictions: dsl.Output[dsl.Artifact],
    verdict: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    summary: dsl.Output[dsl.Markdown],
    report: dsl.Output[dsl.HTML],
) -> str:
    """Let base, champion and merged model answer the evaluation split freely, compare them, and judge by the gate.

    Args:
        model: The merged model.
        base_model_uri: The model it is compared with; a path, s3:// URI or hub id.
        dataset: The samples of validate_data, of which the evaluation split is used.
        metric: How answers are scored, such as exact_match or anls.
        evaluation_options: max_new_tokens (128), the longest answer; batch_size (16), samples that are answered at
            once; gate, what is asked of the model: min_metric (none), min_improvement (0, a tie does not pass) over
            champion or base, max_regression (none) on any tag, such as {"gate": {"min_improvement": 0.01}}.
        registered_model: Name in MLflow's model registry, whose champion is to be beaten; empty for none.
        predictions: JSON Lines of every question, expected answer and all models' answers.
        verdict: JSON of the gate's decision and what it is about, for register.
        metrics: Scores of all models.
        confusion: Expected against given answers, where few are expected.
        summary: The essentials as a table, and every rule of the gate.
        report: Images, questions and answers side by side, with filters.

    Returns:
        "promote" when the gate lets the model through and it has a name to be registered under, else "keep".
    """
    from pathlib import Path

    from minicpmv_finetune.components.evaluate.evaluate import evaluate as run
    from minicpmv_finetune.components.evaluate.evaluate import settings_from
    from minicpmv_finetune.components.evaluate.report import markdown
    from minicpmv_finetune.data.samples import read_info
    from minicpmv_finetune.permanent_errors import permanent_error_marked
    from minicpmv_finetune.tracking.promotion_record import PromotionRecord, write_promotion_record
    from minicpmv_finetune.tracking.registry import champion_to_beat
    from minicpmv_finetune.tracking.step_runs import note_outcome

    options = {"metric": metric, **evaluation_options}
    inputs = {"model": model.uri, "base_model_uri": base_model_uri, "dataset": dataset.uri, "options": options}
    with permanent_error_marked(predictions.uri, inputs):
        settings = settings_from(options)
        # Asked before the models are, which takes long.
        champion = champion_to_beat(registered_model)
        result = run(
            Path(model.path),
            base_model_uri,
            Path(dataset.path),
            Path(predictions.path),
            Path(report.path),
            settings,
            champion.uri if champion else "",
        )
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        if result.confusion:
            rows = [list(row) for row in result.confusion.counts]
            confusion.log_confusion_matrix(list(result.confusion.labels), rows)
        Path(summary.path).write_text(markdown(result))
        found = PromotionRecord(
            promote=result.decision.promote,
            reason=result.decision.reason,
            champion=champion.number if champion else "",
            model_uri=model.uri,
            adapter_uri=model.metadata.get("adapter_uri", ""),
            base_model=base_model_uri,
            generation=model.metadata.get("generation", ""),
            data_fingerprint=read_info(Path(dataset.path)).fingerprint,
            metric=result.metric,
            metrics=result.metrics,
        )
        write_promotion_record(Path(verdict.path), found)
        note_outcome(f"{'passed' if found.promote else 'stopped at'} the gate: {found.reason}")
    return "promote" if found.promote and registered_model else "keep"
