"""The report of a training, one HTML page without other files: curves, metrics, hardware, and the exact command."""

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from minicpmv_finetune import environment
from minicpmv_finetune.cores import cores
from minicpmv_finetune.reports.curves import curves_of
from minicpmv_finetune.reports.pages import write_page
from minicpmv_finetune.reports.training_record import TrainingRecord


def write_report(path: Path, record: TrainingRecord, command: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        record: Record of the training.
        command: Flags of the training script.
    """
    values = {
        "record": record,
        "loss": record.final_loss,
        "steps": int(max(entry.get("step", 0) for entry in record.history)),
        "curves": curves_of(record),
        "facts": _facts(record),
        "command": shlex.join(["minicpmv-finetune", "train", *command]),
    }
    write_page(path, Path(__file__).parent, values)


def _facts(record: TrainingRecord) -> dict[str, str]:
    trained, total = record.parameters["trainable"], record.parameters["total"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores()} cores"
    return {
        "Base model": record.base_model,
        "Generation": f"MiniCPM-V {record.generation}",
        "Trained": f"{trained:,} of {total:,} parameters ({trained / total:.1%})",
        "Maximum slices of an image": str(record.max_slice_nums),
        "Data fingerprint": record.data_fingerprint,
        **{name: record.show(name, value) for name, value in record.figures.items()},
        "Device": f"{device} ({platform.machine()})",
        "Processes": environment.WORLD_SIZE.read(),
        "torch": torch.__version__,
    }
