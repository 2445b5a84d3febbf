"""The training as one HTML page that needs no other file: curves, figures, hardware, and the exact command."""

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..training_record import TrainingRecord

_WIDTH, _HEIGHT = 560, 180
_CURVES = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "eval_token_accuracy": "Evaluation token accuracy",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
}


@dataclass(frozen=True)
class Curve:
    """A figure over the steps, drawn in a box of 560 × 180.

    Attributes:
        title: of the figure.
        points: of an SVG polyline.
        last: (x, y) of its end.
        values: least, greatest and last value.
        steps: first and last step.
    """

    title: str
    points: str
    last: tuple[float, float]
    values: tuple[float, float, float]
    steps: tuple[int, int]


def write_report(path: Path, record: TrainingRecord, command: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        record: of the training.
        command: flags of the training script.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        record=record,
        curves=[curve for name, title in _CURVES.items() if (curve := _curve(record, name, title))],
        facts=_facts(record),
        command=shlex.join(["minicpmv-finetune", "train", *command]),
        width=_WIDTH,
        height=_HEIGHT,
    )
    path.write_text(page)


def _curve(record: TrainingRecord, name: str, title: str) -> Curve | None:
    logged = [(entry["step"], entry[name]) for entry in record.history if name in entry]
    if len(logged) < 2:
        return None
    steps, values = [step for step, _ in logged], [value for _, value in logged]
    low, high = min(values), max(values)
    across, up = max(steps[-1] - steps[0], 1), (high - low) or 1.0
    places = [
        (round((step - steps[0]) / across * _WIDTH, 1), round((1 - (value - low) / up) * _HEIGHT, 1))
        for step, value in logged
    ]
    return Curve(
        title=title,
        points=" ".join(f"{x},{y}" for x, y in places),
        last=places[-1],
        values=(low, high, values[-1]),
        steps=(int(steps[0]), int(steps[-1])),
    )


def _facts(record: TrainingRecord) -> dict[str, str]:
    trained, total = record.parameters["trainable"], record.parameters["total"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "Base model": record.base_model,
        "Generation": f"MiniCPM-V {record.generation}",
        "Trained": f"{trained:,} of {total:,} parameters ({trained / total:.1%})",
        "Most slices of a picture": str(record.max_slice_nums),
        "Data fingerprint": record.data_fingerprint,
        **{name: f"{value:,.4g}" for name, value in record.metrics.items()},
        "Device": f"{device} ({platform.machine()})",
        "Processes": os.environ.get("WORLD_SIZE", "1"),
        "torch": torch.__version__,
    }
