"""Register a model that passed the gate, and make it champion if the champion is still the one it has beaten."""

from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.tracking.promotion_record import read_promotion_record
from minicpmv_finetune.tracking.registry import OvertakenError, is_configured, open_registry
from minicpmv_finetune.tracking.step_runs import note_outcome, step_run


def register(verdict_file: Path, name: str) -> str:
    """Register and promote what evaluate let through.

    Args:
        verdict_file: written by evaluate.
        name: of the registered model.

    Returns:
        What happened, in one sentence.

    Raises:
        UserError: the gate has not let the model through, or MLflow refuses.
        RetryableError: MLflow does not answer; nothing is lost, and trying again finds what was done already.
    """
    verdict = read_promotion_record(verdict_file)
    if not verdict.promote:
        raise UserError(f"{verdict_file}: the gate stopped this model ({verdict.reason}); register one that passed it.")
    if not is_configured():
        sentence = "passed the gate, but MLFLOW_TRACKING_URI is not set, so it is registered nowhere"
        report_outcome(sentence)
        return sentence
    registry = open_registry(name)
    with step_run("register") as run:
        version = registry.register(verdict, run.run_id)
        try:
            # A run whose earlier steps were cached registers the model of an older run: the run counts, not the model.
            registry.promote(version.number, verdict.champion, verdict.reason, environment.PIPELINE_RUN_ID.read())
            sentence = f"version {version.number} of {name} is champion: {verdict.reason}"
        except OvertakenError as error:
            compared = f"version {verdict.champion}" if verdict.champion else "no champion"
            sentence = (
                f"version {version.number} of {name} stays challenger: it was compared with {compared}, but {error}"
            )
        run.log_tags({"minicpmv.version": version.number, "minicpmv.promotion": sentence})
    note_outcome(sentence)
    report_outcome(sentence)
    return sentence
