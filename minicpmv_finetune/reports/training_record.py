"""`training.json` in the adapter's folder: the base, the data, the arguments and the metrics of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.data.samples import read_versioned
from minicpmv_finetune.errors import UserError

RECORD_FILE = "training.json"
_EFFICIENCY = ("tokens/s", "peak_memory_mb", "mfu", "gpu_hours")
SCHEMA_VERSION = 1
_HEADLINE = ("final_loss", "mean_loss", "samples/s", "seconds", "peak_memory_mb")


class TrainingRecord(BaseModel):
    """The content of `training.json`."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    base_model: str = Field(description="Base checkpoint, as the user gave it.")
    base_fingerprint: str = Field(
        default="", description="Fingerprint of the base's weights; empty in records of earlier versions."
    )
    generation: str = Field(description="Generation of the model, such as 4.6.")
    data_fingerprint: str = Field(description="Fingerprint of training and evaluation data.")
    max_slice_nums: int = Field(description="Largest number of slices of an image, without its overview.")
    use_lora: bool = Field(description="Whether LoRA adapters were trained.")
    parameters: dict[str, int] = Field(description='Numbers of parameters: "trainable" and "total".')
    metrics: dict[str, float] = Field(description="Final metrics, by name.")
    planned: dict[str, float] = Field(
        default={}, description="What the formulas of `plan` say of this training on its GPUs, by the metrics' names."
    )
    arguments: dict[str, Any] = Field(description="Arguments by name, without the defaults of transformers.")
    history: list[dict[str, float]] = Field(description="Logged metrics, one entry for each logged step.")
    continued_from: int = Field(
        default=0, description="Step of the checkpoint from which an interrupted training was continued; 0 for none."
    )

    def require_base(self, adapter: Path, base: str, base_fingerprint: str) -> None:
        """Refuse a base model that the adapter was not trained on.

        Args:
            adapter: Folder of the adapter that has this record.
            base: Address of the base model, for the error message.
            base_fingerprint: Fingerprint of the base model.

        Raises:
            UserError: The base is another one, for example the merged model.
        """
        if self.base_fingerprint and self.base_fingerprint != base_fingerprint:
            raise UserError(
                f"{base}: not the weights that {adapter} was trained on ({self.base_model}, fingerprint "
                f"{self.base_fingerprint:.12}, here {base_fingerprint:.12}); give that base model."
            )

    @property
    def final_loss(self) -> float:
        """The last loss that was logged; a training shorter than its logging interval has only its mean loss."""
        return next((entry["loss"] for entry in reversed(self.history) if "loss" in entry), self.metrics["loss"])

    @property
    def figures(self) -> dict[str, float]:
        """The metrics by the names of pages and tables, where the file's `loss` says that it is the mean."""
        rest = {name: value for name, value in self.metrics.items() if name != "loss"}
        return {"final_loss": self.final_loss, "mean_loss": self.metrics["loss"], **rest}

    @property
    def efficiency(self) -> dict[str, float]:
        """Speed, memory and use of the GPUs, and beside each what `plan` says, by the names of MLflow's metrics."""
        measured = {name: self.metrics[name] for name in _EFFICIENCY if name in self.metrics}
        rows = {f"efficiency/{name}": value for name, value in measured.items()}
        return rows | {f"plan/{name}": value for name, value in self.planned.items()}

    def show(self, name: str, value: float) -> str:
        """A metric as text, with what `plan` says of it."""
        planned = f" (plan: {format_figure(self.planned[name])})" if name in self.planned else ""
        return f"{format_figure(value)}{planned}"

    @property
    def headline(self) -> dict[str, float]:
        """The metrics of Kubeflow's table, by name there, and in its comparison of runs above those of evaluate."""
        return {name: value for name, value in self.figures.items() if name in _HEADLINE}

    def markdown(self) -> str:
        """The base, the share of trained parameters and the final metrics as a table."""
        share = self.parameters["trainable"] / self.parameters["total"]
        rows = {
            "Base model": f"`{self.base_model}` (MiniCPM-V {self.generation})",
            "Trained": f"{self.parameters['trainable']:,} of {self.parameters['total']:,} parameters ({share:.1%})",
            **{f"`{name}`": self.show(name, value) for name, value in self.figures.items()},
        }
        if self.continued_from:
            rows["Continued"] = f"from step {self.continued_from:,}; speed and time are those of the steps after it"
        return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def format_figure(value: float) -> str:
    """A metric for a reader: four digits, or a whole number where that is longer."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mean_loss(history: Sequence[Mapping[str, float]]) -> float | None:
    """The mean loss of a training that was continued, over the steps of all its parts; None if none was logged.

    Args:
        history: Logged metrics; each loss is the mean of the steps since the loss before it.
    """
    total, last = 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def read_record(folder: Path) -> TrainingRecord:
    """The record of a finished training.

    Raises:
        UserError: The folder has no record, so it is not the output of the train step, or the record was written by a
            newer version.
    """
    return read_versioned(folder / RECORD_FILE, TrainingRecord, SCHEMA_VERSION, made_by="train")
