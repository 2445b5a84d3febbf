"""A training's figures over its steps, as lines that a page draws without any script (`curves.html`)."""

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
    """A figure over the steps, drawn in a box of `WIDTH` × `HEIGHT`.

    Attributes:
        title: of the figure.
        points: of an SVG polyline.
        last: (x, y) of its end.
        values: least, greatest and last value.
        steps: first and last step.
        size: width and height of the box.
    """

    title: str
    points: str
    last: tuple[float, float]
    values: tuple[float, float, float]
    steps: tuple[int, int]
    size: tuple[int, int] = (WIDTH, HEIGHT)


def curves_of(record: TrainingRecord) -> list[Curve]:
    """The curves of every figure that was logged at least twice."""
    return [curve for name, title in _TITLES.items() if (curve := _curve(record, name, title))]


def _curve(record: TrainingRecord, name: str, title: str) -> Curve | None:
    logged = [(entry["step"], entry[name]) for entry in record.history if name in entry]
    if len(logged) < 2:
        return None
    steps, values = [step for step, _ in logged], [value for _, value in logged]
    low, high = min(values), max(values)
    across, up = max(steps[-1] - steps[0], 1), (high - low) or 1.0
    places = [
        (round((step - steps[0]) / across * WIDTH, 1), round((1 - (value - low) / up) * HEIGHT, 1))
        for step, value in logged
    ]
    return Curve(
        title=title,
        points=" ".join(f"{x},{y}" for x, y in places),
        last=places[-1],
        values=(low, high, values[-1]),
        steps=(int(steps[0]), int(steps[-1])),
    )
