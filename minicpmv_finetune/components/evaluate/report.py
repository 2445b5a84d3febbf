"""The evaluation as a page one wants to read: one HTML file that needs nothing beside it, and a table in Markdown.

The file stays below 25 MB at any number of samples: it shows a seeded choice of them, as many of each outcome as of
the others, with small images, until a budget is spent; all answers are in the predictions file. Every text from
the data or a model is escaped by the template, and a content security policy lets run no script but the page's own
and load nothing from anywhere.
"""

import base64
import hashlib
import html
import io
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from minicpmv_finetune.data.image_files import to_rgb
from minicpmv_finetune.data.samples import ImageRef, open_image
from minicpmv_finetune.reports.curves import curves_of
from minicpmv_finetune.reports.pages import write_page
from minicpmv_finetune.reports.training_record import TrainingRecord

from .assessment import MIXED, OTHER, Confusion, Evaluation, Prediction, improvement
from .comparison import Outcome

_SHOWN = 300  # samples in the gallery
_IMAGE_BUDGET = 14_000_000  # bytes of encoded images in the whole file
_IMAGES_PER_SAMPLE = 4
_THUMBNAIL = 320  # longest side in pixels
_PIXEL_ART = 160  # an image not larger than this is shown with sharp pixels
_LONGEST_TEXT = 2000  # characters of one answer in the gallery
_GROUPS_SHOWN = 200
_SEED = 0

_METRIC_TITLES = {
    "exact_match": "exact match",
    "anls": "ANLS",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "token_f1": "token F1",
    "cer": "character error rate",
    "wer": "word error rate",
    "rouge_l": "ROUGE-L",
    "multiple_choice": "multiple choice accuracy",
    "json_fields": "JSON field accuracy",
    MIXED: "mean score",
}
_OUTCOMES: dict[Outcome, str] = {
    "fixed": "Fixed",
    "both_right": "Right before and after",
    "broken": "Broken",
    "both_wrong": "Still wrong",
}
_OUTCOMES_WITHOUT_BASE: dict[Outcome, str] = {"fixed": "Right", "both_wrong": "Wrong"}


@dataclass(frozen=True)
class _Card:
    """One sample of the gallery."""

    prediction: Prediction
    thumbnails: tuple[str, ...]
    images_left_out: int
    is_pixel_art: bool


def write_report(
    path: Path, evaluation: Evaluation, facts: Mapping[str, object], record: TrainingRecord | None = None
) -> None:
    """Write the page.

    Args:
        path: receives it, whole or not at all.
        evaluation: what it shows.
        facts: how the evaluation was made, by name; `generation` is in the title.
        record: of the training, whose curves are drawn; none leaves them out.
    """
    here = Path(__file__).parent
    # The script stands in the page as it is in the file, so that its hash in the policy allows it and no other.
    script = (here / "report.js").read_text()
    values = {
        "evaluation": evaluation,
        "metric": metric_title(evaluation.metric),
        "outcomes": _OUTCOMES if evaluation.comparison else _OUTCOMES_WITHOUT_BASE,
        "counts": _counts(evaluation),
        "groups": sorted(evaluation.by_group.items(), key=lambda item: -item[1][0])[:_GROUPS_SHOWN],
        "confusion": evaluation.confusion and _table(evaluation.confusion),
        "curves": curves_of(record) if record else [],
        "improvement": improvement,
        "cards": _cards(evaluation.predictions),
        "facts": facts,
        "script": Markup(script),  # noqa: S704
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    write_page(path, here, values, {"percent": percent, "points": _points, "shortened": _shortened})


def markdown(evaluation: Evaluation) -> str:
    """The essentials as a table, for Kubeflow's Markdown artifact."""
    figures, metric = evaluation.metrics, evaluation.metric
    rows = [(metric_title(metric), metric)] + ([("ANLS", "anls")] if metric != "anls" else [])
    models = ["base"] if evaluation.comparison else []
    models += ["champion"] if evaluation.champion else []
    models += ["tuned"]
    lines = [f"**{headline(evaluation)}**", ""]
    lines += ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    lines += [
        f"| {title} | " + " | ".join(percent(figures[f"{model}_{name}"]) for model in models) + " |"
        for title, name in rows
    ]
    if evaluation.comparison is not None:
        counts = evaluation.comparison.outcomes
        lines += ["", ", ".join(f"{title.lower()} {counts[kind]}" for kind, title in _OUTCOMES.items()) + "."]
    lines += ["", "| rule of the gate | |", "|---|---|"]
    lines += [
        f"| {_cell(check.reason)} | {'kept' if check.passed else 'broken'} |" for check in evaluation.decision.checks
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that may hold a tag of the data, in a table's cell."""
    escaped = html.escape(text).replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


def headline(evaluation: Evaluation) -> str:
    """The result in one sentence."""
    title = metric_title(evaluation.metric)
    text = f"{title[0].upper()}{title[1:]} {percent(evaluation.tuned.value)} on {len(evaluation.predictions):,} samples"
    gain = evaluation.improvement
    if gain is None or evaluation.comparison is None:
        return f"{text}."
    interval = f", 95 % interval {_points(gain.low)} to {_points(gain.high)}" if math.isfinite(gain.low) else ""
    base = percent(evaluation.comparison.base.value)
    if not gain.value:
        return f"{text}, as the base model{interval}."
    direction = "better" if gain.value > 0 else "worse"
    return (
        f"{text}: {_points(abs(gain.value), signed=False)} points {direction} than the base model's {base}{interval}."
    )


def metric_title(name: str) -> str:
    """A metric's name as prose writes it."""
    return _METRIC_TITLES.get(name, name)


def percent(value: float) -> str:
    """A share as per cent; 100 % is said only of all."""
    if not math.isfinite(value):
        return "–"
    shown = f"{value:.1%}"
    return f"{math.floor(value * 1000) / 10:.1f}%" if shown == "100.0%" and value < 1 else shown


def _points(value: float, signed: bool = True) -> str:
    if not math.isfinite(value):
        return "–"
    # A typographic minus, and no "-0.0".
    return f"{round(value * 100, 1) + 0.0:{'+' if signed else ''}.1f}".replace("-", "−")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _counts(evaluation: Evaluation) -> dict[Outcome, int]:
    outcomes = [prediction.outcome for prediction in evaluation.predictions]
    return {kind: outcomes.count(kind) for kind in _OUTCOMES}


def _cards(predictions: Sequence[Prediction]) -> list[_Card]:
    cards, spent = [], 0
    for prediction in _chosen(predictions):
        images = prediction.sample.images
        thumbnails: list[str] = []
        for image in images[:_IMAGES_PER_SAMPLE]:
            thumbnail = _thumbnail(image) if spent < _IMAGE_BUDGET else None
            if thumbnail:
                spent += len(thumbnail)
                thumbnails.append(thumbnail)
        cards.append(
            _Card(
                prediction,
                tuple(thumbnails),
                images_left_out=len(images) - len(thumbnails),
                is_pixel_art=all(max(image.width, image.height) <= _PIXEL_ART for image in images),
            )
        )
    return cards


def _chosen(predictions: Sequence[Prediction]) -> list[Prediction]:
    """As many of each outcome as there are or fit, so that the few broken ones are seen among the many fixed."""
    order = random.Random(_SEED).sample(range(len(predictions)), len(predictions))  # noqa: S311
    queues: dict[Outcome, list[int]] = {}
    for number in order:
        queues.setdefault(predictions[number].outcome, []).append(number)
    chosen: list[int] = []
    while len(chosen) < _SHOWN and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < _SHOWN:
                chosen.append(queue.pop())
    return [predictions[number] for number in sorted(chosen)]


def _thumbnail(image_ref: ImageRef) -> str:
    image = to_rgb(open_image(image_ref), "white")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


@dataclass(frozen=True)
class _Table:
    """A confusion matrix ready to draw; `short` leaves out what all labels share."""

    labels: tuple[str, ...]
    short: tuple[str, ...]
    rows: tuple[tuple[tuple[int, float], ...], ...]  # count and share of its row


def _table(confusion: Confusion) -> _Table:
    labels = confusion.labels
    has_other = any(row[-1] for row in confusion.counts)
    columns = len(labels) if has_other else len(labels) - 1
    rows = tuple(
        tuple((count, count / sum(row)) for count in row[:columns])
        for row, label in zip(confusion.counts, labels, strict=True)
        if label != OTHER
    )
    return _Table(labels[:columns], (*_without_shared(labels[:-1]), "other")[:columns], rows)


def _without_shared(labels: Sequence[str]) -> tuple[str, ...]:
    """`The digit is 3.` among its like becomes `3`."""
    words = [label.split(" ") for label in labels]
    shared = next((place for place, column in enumerate(zip(*words, strict=False)) if len(set(column)) > 1), 0)
    rest = [" ".join(label[shared:]) for label in words]
    ends = {re.sub(r".*\w", "", label, flags=re.DOTALL) for label in rest}
    end = len(ends.pop()) if len(ends) == 1 else 0
    trimmed = [label[: len(label) - end] for label in rest]
    return tuple(trimmed) if all(trimmed) else tuple(labels)
