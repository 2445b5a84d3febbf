"""What evaluation found about one model, for whoever registers it: a small JSON file that stands for a large folder."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune import storage


class PromotionRecord(BaseModel):
    """The content of the verdict file."""

    model_config = ConfigDict(frozen=True)

    promote: bool = Field(description="whether the gate lets the model through")
    reason: str = Field(description="the gate's, in words")
    champion: str = Field(default="", description="registered version it was compared with; empty when there was none")
    model_uri: str = Field(description="where the merged folder lies")
    adapter_uri: str = Field(default="", description="where what was trained lies; empty if unknown")
    base_model: str = Field(description="as the user gave it")
    generation: str = Field(description="such as 4.6")
    data_fingerprint: str = Field(description="of training and evaluation data")
    metric: str
    metrics: dict[str, float] = Field(description="all figures of the evaluation")


def write_promotion_record(path: Path, verdict: PromotionRecord) -> None:
    """Write the file, whole or not at all."""
    storage.write_bytes(str(path), (verdict.model_dump_json(indent=1) + "\n").encode())


def read_promotion_record(path: Path) -> PromotionRecord:
    """Read what evaluate wrote.

    Raises:
        UserError: there is no such file.
    """
    return PromotionRecord.model_validate_json(storage.read_bytes(str(path)))


# The names in pipelines that 0.1.0 compiled.
Verdict, write_verdict = PromotionRecord, write_promotion_record
