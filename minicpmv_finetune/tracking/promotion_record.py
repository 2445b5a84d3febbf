"""The result of evaluating one model, for the register step: a small JSON file in place of a large model folder."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError, describe_validation_error


class PromotionRecord(BaseModel):
    """The content of a promotion record."""

    model_config = ConfigDict(frozen=True)

    promote: bool = Field(description="Whether the model passed the gate.")
    reason: str = Field(description="Reason of the gate's decision, in words.")
    champion: str = Field(
        default="", description="Registered version that the model was compared with; empty when there was none."
    )
    model_uri: str = Field(description="Address of the merged folder.")
    adapter_uri: str = Field(
        default="", description="Address of the adapter, or of the full fine-tune; empty if unknown."
    )
    base_model: str = Field(description="Base checkpoint, as the user gave it.")
    generation: str = Field(description="Generation of the model, such as 4.6.")
    data_fingerprint: str = Field(description="Fingerprint of training and evaluation data.")
    metric: str = Field(description='Name of the metric, or "mixed" when the samples name different ones.')
    metrics: dict[str, float] = Field(description="All metrics of the evaluation, by name.")


def write_promotion_record(path: Path, record: PromotionRecord) -> None:
    """Write the file atomically."""
    storage.write_bytes(str(path), (record.model_dump_json(indent=1) + "\n").encode())


def read_promotion_record(path: Path) -> PromotionRecord:
    """Read a file that evaluate wrote.

    Raises:
        UserError: There is no such file, or it is no promotion record.
    """
    try:
        return PromotionRecord.model_validate_json(storage.read_bytes(str(path)))
    except ValidationError as error:
        raise UserError(
            f"{path}: not a promotion record ({describe_validation_error(error, 'the file')}); give the file that "
            "evaluate wrote in a pipeline."
        ) from error


# Pipelines that were compiled by 0.1.0 import these names.
Verdict, write_verdict = PromotionRecord, write_promotion_record
