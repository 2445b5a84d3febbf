"""Register a model that passed the gate, and make it champion if it was compared with the current champion."""

from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.run_records import Result
from minicpmv_finetune.tracking.promotion_record import read_promotion_record
from minicpmv_finetune.tracking.registry import OvertakenError, is_configured, open_registry
from minicpmv_finetune.tracking.step_runs import note_outcome, step_run


def register(record_file: Path, name: str) -> str:
    """Register and promote a model that passed the gate.

    Args:
        record_file: Promotion record written by evaluate.
        name: Name of the registered model; empty registers nothing.

    Returns:
        The result, in one sentence.

    Raises:
        UserError: The model did not pass the gate, or MLflow refuses.
        RetryableError: MLflow does not answer; a retry continues after the calls that succeeded.
    """
    record = read_promotion_record(record_file)
    if not record.promote:
        raise UserError(
            f"{record_file}: this model did not pass the gate ({record.reason}); register a model that passed it."
        )
    missing = "registered_model is empty" if not name else "" if is_configured() else "MLFLOW_TRACKING_URI is not set"
    if missing:
        sentence = f"passed the gate, but it is not registered, because {missing}"
        note_outcome("not registered", sentence)
        report_outcome(sentence)
        return sentence
    registry = open_registry(name)
    with step_run("register") as run:
        version = registry.register(record, run.run_id)
        try:
            # The claim is the run's id and not the model's: a run with cached steps registers the model of an older
            # run, and its promotion is a new one.
            registry.promote(version.number, record.champion, record.reason, environment.PIPELINE_RUN_ID.read())
            result: Result = "promoted"
            sentence = f"version {version.number} of {name} is champion: {record.reason}"
        except OvertakenError as error:
            result = "challenger"
            compared = f"version {record.champion}" if record.champion else "no champion"
            sentence = (
                f"version {version.number} of {name} stays challenger: it was compared with {compared}, but {error}"
            )
        run.log_tags({"minicpmv.version": version.number, "minicpmv.promotion": sentence})
    note_outcome(result, sentence)
    report_outcome(sentence)
    return sentence
