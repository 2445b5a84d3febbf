"""A training's record for tests that need one, whatever it says."""

from typing import Any

from minicpmv_finetune.reports.training_record import TrainingRecord

_FIELDS: dict[str, Any] = {
    "base_model": "base",
    "generation": "4.6",
    "data_fingerprint": "data",
    "max_slice_nums": 9,
    "use_lora": True,
    "parameters": {"trainable": 1, "total": 2},
    "metrics": {"loss": 0.5},
    "arguments": {},
    "history": [],
}


def example_record(**changed: Any) -> TrainingRecord:
    """The record with some of its fields changed."""
    return TrainingRecord(**{**_FIELDS, **changed})
