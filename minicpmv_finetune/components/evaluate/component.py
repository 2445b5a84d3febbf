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
    promotion_record: dsl.Output[dsl.Artifact],
    evaluation_metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    evaluation_summary: dsl.Output[dsl.Markdown],
    evaluation_report: dsl.Output[dsl.HTML],
    decision: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Compare the answers of base, champion and merged model to the evaluation split, and apply the gate.

    Args:
        model: The merged model.
        base_model_uri: The model that it is compared with; a path, s3:// URI or hub id.
        dataset: The samples of validate_data, of which the evaluation split is used.
        metric: The metric that scores the answers, such as exact_match or anls.
        evaluation_options: max_new_tokens (128), the longest answer; batch_size (16), samples answered at the same
            time; gate, the rules that the model must pass: min_metric (none), min_improvement (0, a tie does not pass)
            on champion or base, min_improvement_low (none), the lower end of its 95 % interval, where 0 requires more
            than noise, max_regression (none) on any tag, such as {"gate": {"min_improvement": 0.01}}.
        registered_model: Name in MLflow's model registry, whose champion the model must beat; empty for none.
        predictions: JSON Lines with every question, the expected answer and the answers of all models.
        promotion_record: JSON with the gate's decision, its reason and the model's address, for register.
        evaluation_metrics: Score of the merged model and of those it is compared with, and the gain.
        confusion: Expected answers against given answers, if the expected answers are a few classes.
        evaluation_summary: The scores as a table, and the result of every rule of the gate.
        evaluation_report: Images, questions and answers side by side, with filters.
        decision: promote if the model passed the gate, else keep.
    """
    from pathlib import Path

    from minicpmv_finetune.attempts import run_step
    from minicpmv_finetune.components.evaluate.evaluate import evaluate as run
    from minicpmv_finetune.components.evaluate.evaluate import settings_from
    from minicpmv_finetune.components.evaluate.promotion import record_decision
    from minicpmv_finetune.components.evaluate.report import markdown
    from minicpmv_finetune.reports.markdown import write_summary
    from minicpmv_finetune.tracking.registry import champion_to_beat
    from minicpmv_finetune.tracking.step_runs import link_to_run

    options = {"metric": metric, **evaluation_options}
    inputs = {"model": model.uri, "base_model_uri": base_model_uri, "dataset": dataset.uri, "options": options}

    def work() -> None:
        settings = settings_from(options)
        champion = champion_to_beat(registered_model)  # before the answers are generated, which takes long
        files = Path(predictions.path), Path(evaluation_report.path)
        champion_uri = champion.uri if champion else ""
        result = run(Path(model.path), base_model_uri, Path(dataset.path), *files, settings, champion_uri)
        # The UI's heading of the table; a metric cannot be a name.
        evaluation_metrics.metadata["display_name"] = f"evaluation_metrics ({result.metric})"
        for name, value in result.headline.items():
            evaluation_metrics.log_metric(name, value)
        if matrix := result.confusion:
            confusion.log_confusion_matrix(list(matrix.labels), [list(row) for row in matrix.counts])
        write_summary(evaluation_summary.path, markdown(result) + link_to_run("evaluate"))
        about = champion, base_model_uri, Path(dataset.path), model.uri, model.metadata
        has_passed = record_decision(Path(promotion_record.path), result, *about)
        Path(decision).write_text("promote" if has_passed else "keep")

    run_step("evaluate", predictions.uri, inputs, work)
