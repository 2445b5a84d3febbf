"""The decision whether a scheduled run has new data, and where its training starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv_finetune import environment
from minicpmv_finetune.data.samples import read_info
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.tracking.registry import Version, champion_of, is_configured
from minicpmv_finetune.tracking.step_runs import note_outcome

STARTS = ("base", "champion")


@dataclass(frozen=True)
class Plan:
    """What a scheduled run does.

    Attributes:
        is_new: Whether the data is new, so that it is trained on.
        flags: The flags to train with.
        sentence: Why, in words.
    """

    is_new: bool
    flags: dict[str, Any]
    sentence: str


def plan_retraining(
    dataset: Path, base_model_uri: str, registered_model: str, start_from: str, training_flags: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Whether the data is new, and the flags to train with; pipelines that 0.1.0 compiled call this function."""
    found = plan(dataset, base_model_uri, registered_model, start_from, training_flags)
    return found.is_new, found.flags


def plan(
    dataset: Path, base_model_uri: str, registered_model: str, start_from: str, training_flags: Mapping[str, Any]
) -> Plan:
    """Compare the data with the champion's data, and choose where training starts.

    Args:
        dataset: Folder written by validate_data.
        base_model_uri: Base checkpoint of the training.
        registered_model: Name in MLflow's registry.
        start_from: "base", or "champion" to continue from the champion's adapter.
        training_flags: Flags of the training script, by name.

    Returns:
        Whether to train, and the flags to train with.

    Raises:
        UserError: Training cannot continue from the champion's adapter, or an argument is unusable.
        RetryableError: MLflow does not answer.
    """
    if start_from not in STARTS:
        raise UserError(f"start_from: {start_from!r} is none of {', '.join(STARTS)}; choose one.")
    if not registered_model:
        raise UserError("registered_model: empty, so there is no champion to compare with; give a name.")
    if not is_configured():
        raise UserError(
            f"{environment.TRACKING_URI}: not set, so there is no champion to compare with, and the same data would be "
            "trained on every time; name MLflow in the profile, or use the pipeline minicpmv-finetune."
        )
    champion = champion_of(registered_model)
    fingerprint = read_info(dataset).fingerprint
    if champion is not None and champion.data_fingerprint == fingerprint:
        sentence = f"nothing new: version {champion.number} of {registered_model} was tuned on this data"
        note_outcome("nothing new", sentence)
        report_outcome(sentence)
        return Plan(False, dict(training_flags), sentence)
    flags = dict(training_flags)
    start = "the base model"
    if champion is not None and start_from == "champion":
        flags["lora_weight_path"] = _adapter_of(champion, base_model_uri)
        start = f"the adapter of version {champion.number}"
    sentence = f"the data is new, training starts from {start}"
    report_outcome(sentence)
    return Plan(True, flags, sentence)


def _adapter_of(champion: Version, base_model_uri: str) -> str:
    if champion.base_model != base_model_uri:
        raise UserError(
            f"start_from: the champion, version {champion.number}, was tuned from {champion.base_model}, not from "
            f"{base_model_uri}; start from base, or give the champion's base model."
        )
    if not champion.adapter_uri:
        raise UserError(
            f"start_from: the champion, version {champion.number}, has no adapter to continue from; start from base."
        )
    return champion.adapter_uri
