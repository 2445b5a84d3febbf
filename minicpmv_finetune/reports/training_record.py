"""`training.json` beside the adapter: what was trained, on what, with which arguments, and how the loss went."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.data.samples import read_versioned

RECORD_FILE = "training.json"
SCHEMA_VERSION = 1


class TrainingRecord(BaseModel):
    """The content of `training.json`."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    base_model: str = Field(description="as the user gave it")
    base_fingerprint: str = Field(default="", description="of its weights; empty in records of earlier versions")
    generation: str
    data_fingerprint: str
    max_slice_nums: int
    use_lora: bool
    parameters: dict[str, int] = Field(description="numbers of trainable and of all parameters")
    metrics: dict[str, float] = Field(description="final figures")
    arguments: dict[str, Any] = Field(description="what was asked for, without defaults of transformers")
    history: list[dict[str, float]] = Field(description="what was logged, by step")

    def markdown(self) -> str:
        """The essentials as a table."""
        share = self.parameters["trainable"] / self.parameters["total"]
        rows = {
            "Base model": f"`{self.base_model}` (MiniCPM-V {self.generation})",
            "Trained": f"{self.parameters['trainable']:,} of {self.parameters['total']:,} parameters ({share:.1%})",
            **{name: f"{value:.4g}" for name, value in self.metrics.items()},
        }
        return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def read_record(folder: Path) -> TrainingRecord:
    """The record of a finished training.

    Raises:
        UserError: the folder holds none, so it is not the train step's result, or one of a newer program.
    """
    return read_versioned(folder / RECORD_FILE, TrainingRecord, SCHEMA_VERSION, made_by="train")
