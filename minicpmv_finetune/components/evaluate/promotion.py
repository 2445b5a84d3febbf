"""The promotion record of an evaluation, which the register step reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpmv_finetune.data.samples import read_info
from minicpmv_finetune.run_records import Result
from minicpmv_finetune.tracking.promotion_record import PromotionRecord, write_promotion_record
from minicpmv_finetune.tracking.registry import Version
from minicpmv_finetune.tracking.step_runs import note_outcome

from .assessment import Evaluation


def record_decision(
    path: Path,
    evaluation: Evaluation,
    champion: Version | None,
    base_model_uri: str,
    dataset: Path,
    model_uri: str,
    model_metadata: Mapping[str, Any],
) -> bool:
    """Write the promotion record, and note the gate's decision as the outcome of the pipeline run.

    Args:
        path: Path of the promotion record.
        evaluation: Result of the evaluation.
        champion: Champion that the model was compared with; None without a champion.
        base_model_uri: Base checkpoint, as the user gave it.
        dataset: Folder written by validate_data.
        model_uri: Address of the merged folder.
        model_metadata: Metadata of the merged model's artifact, as the merge step wrote it.

    Returns:
        Whether the model passed the gate.
    """
    record = PromotionRecord(
        promote=evaluation.decision.promote,
        reason=evaluation.decision.reason,
        champion=champion.number if champion else "",
        model_uri=model_uri,
        adapter_uri=model_metadata.get("adapter_uri", ""),
        base_model=base_model_uri,
        generation=model_metadata.get("generation", ""),
        data_fingerprint=read_info(dataset).fingerprint,
        metric=evaluation.metric,
        metrics=evaluation.metrics,
    )
    write_promotion_record(path, record)
    result: Result = "passed the gate" if record.promote else "failed the gate"
    note_outcome(result, f"{result}: {record.reason}")
    return record.promote
