"""Whether a scheduled run has anything to do, and where its training starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpmv_finetune.data.samples import read_info
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.tracking.registry import Version, champion_of
from minicpmv_finetune.tracking.step_runs import note_outcome

STARTS = ("base", "champion")


def plan_retraining(
    dataset: Path, base_model_uri: str, registered_model: str, start_from: str, training_flags: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Compare the data with the champion's.

    Args:
        dataset: folder written by validate_data.
        base_model_uri: checkpoint that is tuned.
        registered_model: name in MLflow's registry.
        start_from: "base", or "champion" to go on from its adapter.
        training_flags: of the training script.

    Returns:
        Whether there is anything new, and the flags to train with.

    Raises:
        UserError: the champion's adapter cannot be gone on from, or an argument is unusable.
        RetryableError: MLflow does not answer.
    """
    if start_from not in STARTS:
        raise UserError(f"start_from: {start_from!r} is none of {', '.join(STARTS)}; choose one.")
    if not registered_model:
        raise UserError("registered_model: empty, so there is no champion to compare with; give a name.")
    champion = champion_of(registered_model)
    fingerprint = read_info(dataset).fingerprint
    if champion is not None and champion.data_fingerprint == fingerprint:
        sentence = f"nothing new: version {champion.number} of {registered_model} was tuned on this data"
        note_outcome(sentence)
        report_outcome(sentence)
        return False, dict(training_flags)
    flags = dict(training_flags)
    start = "the base model"
    if champion is not None and start_from == "champion":
        flags["lora_weight_path"] = _adapter(champion, base_model_uri)
        start = f"the adapter of version {champion.number}"
    report_outcome(f"the data is new, training starts from {start}")
    return True, flags


def _adapter(champion: Version, base_model_uri: str) -> str:
    if champion.base_model != base_model_uri:
        raise UserError(
            f"start_from: the champion, version {champion.number}, was tuned from {champion.base_model}, not from "
            f"{base_model_uri}; start from base, or give the champion's base model."
        )
    if not champion.adapter_uri:
        raise UserError(f"start_from: version {champion.number} names no adapter to go on from; start from base.")
    return champion.adapter_uri
