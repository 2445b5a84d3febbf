"""The metrics of a training by step, as lines that a page draws without a script (`curves.html`)."""

from dataclasses import dataclass

from .training_record import TrainingRecord

WIDTH, HEIGHT = 560, 180
_TITLES = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "eval_token_accuracy": "Evaluation token accuracy",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
}


@dataclass(frozen=True)
class Curve:
    """A metric by step, drawn in a box of `WIDTH` × `HEIGHT`.

    Attributes:
        title: Title of the curve.
        points: Points of an SVG polyline.
        last: Position (x, y) of the last point.
        values: Least, greatest and last value.
        steps: First and last step.
        size: Width and height of the box.
    """

    title: str
    points: str
    last: tuple[float, float]
    values: tuple[float, float, float]
    steps: tuple[int, int]
    size: tuple[int, int] = (WIDTH, HEIGHT)


def curves_of(record: TrainingRecord) -> list[Curve]:
    """The curves of all metrics that were logged at least twice."""
    return [curve for name, title in _TITLES.items() if (curve := _curve(record, name, title))]


def _curve(record: TrainingRecord, name: str, title: str) -> Curve | None:
    logged = [(entry["step"], entry[name]) for entry in record.history if name in entry]
    if len(logged) < 2:
        return None
    steps, values = [step for step, _ in logged], [value for _, value in logged]
    low, high = min(values), max(values)
    step_range, value_range = max(steps[-1] - steps[0], 1), high - low
    points = [
        # A constant is a line halfway up.
        (
            round((step - steps[0]) / step_range * WIDTH, 1),
            round((1 - (value - low) / value_range if value_range else 0.5) * HEIGHT, 1),
        )
        for step, value in logged
    ]
    return Curve(
        title=title,
        points=" ".join(f"{x},{y}" for x, y in points),
        last=points[-1],
        values=(low, high, values[-1]),
        steps=(int(steps[0]), int(steps[-1])),
    )
