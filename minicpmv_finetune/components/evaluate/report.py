"""The report of the evaluation: a self-contained HTML page, and a table in Markdown.

The page stays below 25 MB for any number of samples: it shows a seeded random choice with the same number of samples
of each outcome, and small images until a size limit is reached; all answers are in the predictions file. The template
escapes every text from the data or a model, and a content security policy allows only the page's own script and no
requests.
"""

import base64
import hashlib
import io
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from minicpmv_finetune.data.image_files import to_rgb
from minicpmv_finetune.data.samples import ImageRef, open_image
from minicpmv_finetune.reports.curves import curves_of
from minicpmv_finetune.reports.markdown import escape
from minicpmv_finetune.reports.pages import write_page
from minicpmv_finetune.reports.training_record import TrainingRecord

from .assessment import MIXED, OTHER, Confusion, Evaluation, Prediction, improvement_of
from .comparison import Outcome

_MAX_CARDS = 300  # samples in the gallery
_MAX_IMAGE_BYTES = 14_000_000  # encoded images in the whole file
_IMAGES_PER_SAMPLE = 4
_THUMBNAIL_SIDE = 320  # longest side in pixels
_MAX_PIXEL_ART_SIDE = 160  # an image up to this size in pixels is displayed without smoothing
_MAX_TEXT_LENGTH = 2000  # characters of one text in the gallery
_MAX_GROUPS = 200
_COLUMNS_BESIDE_SCORES = 11  # a confusion matrix with more columns is below the scores
_LONGEST_LEVEL_LABEL = 5  # characters; a longer heading of a narrow column is written downwards
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
    "teds": "TEDS",
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
    """Write the HTML page.

    Args:
        path: Path of the page, which is written atomically.
        evaluation: Result of the evaluation.
        facts: Circumstances of the evaluation, by name; the title contains `generation`.
        record: Record of the training, whose curves are drawn; None for no curves.
    """
    folder = Path(__file__).parent
    # The page contains the script unchanged, so that the policy allows this script by its hash and no other.
    script = (folder / "report.js").read_text()
    values = {
        "evaluation": evaluation,
        "metric": metric_title(evaluation.metric),
        "outcomes": _OUTCOMES if evaluation.comparison else _OUTCOMES_WITHOUT_BASE,
        "counts": _counts(evaluation),
        "groups": sorted(evaluation.by_group.items(), key=lambda item: -item[1][0])[:_MAX_GROUPS],
        "confusion": evaluation.confusion and _matrix(evaluation.confusion),
        "curves": curves_of(record) if record else [],
        "improvement_of": improvement_of,
        "cards": _cards(evaluation.predictions),
        "facts": facts,
        "script": Markup(script),  # noqa: S704
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    filters: dict[str, Callable[..., object]] = {
        "percent": format_percent,
        "points": _format_points,
        "shortened": _shorten,
    }
    write_page(path, folder, values, filters)


def markdown(evaluation: Evaluation) -> str:
    """The most important results as a table, for Kubeflow's Markdown artifact."""
    figures, metric = evaluation.metrics, evaluation.metric
    rows = [(metric_title(metric), metric)] + ([("ANLS", "anls")] if metric != "anls" else [])
    models = ["base"] if evaluation.comparison else []
    models += ["champion"] if evaluation.champion else []
    models += ["tuned"]
    lines = [f"**{escape(headline(evaluation))}**", ""]
    lines += ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    lines += [
        f"| {title} | " + " | ".join(format_percent(figures[f"{model}_{name}"]) for model in models) + " |"
        for title, name in rows
    ]
    if evaluation.comparison is not None:
        counts = evaluation.comparison.outcomes
        lines += ["", ", ".join(f"{title.lower()} {counts[kind]}" for kind, title in _OUTCOMES.items()) + "."]
    lines += ["", "| rule of the gate | |", "|:---|---|"]
    lines += [
        f"| {escape(check.reason)} | {'passed' if check.passed else 'failed'} |" for check in evaluation.decision.checks
    ]
    return "\n".join(lines) + "\n"


def headline(evaluation: Evaluation) -> str:
    """The result in one sentence."""
    title = metric_title(evaluation.metric)
    tuned, samples = format_percent(evaluation.tuned.value), len(evaluation.predictions)
    text = f"{title[0].upper()}{title[1:]} {tuned} on {samples:,} samples"
    gain = evaluation.improvement
    if gain is None or evaluation.comparison is None:
        return f"{text}."
    noise = ", within noise" if gain.value and gain.low <= 0 <= gain.high else ""
    interval = (
        f", 95 % interval {_format_points(gain.low)} to {_format_points(gain.high)}{noise}"
        if math.isfinite(gain.low)
        else ""
    )
    base = format_percent(evaluation.comparison.base.value)
    if not gain.value:
        return f"{text}, the same as the base model{interval}."
    direction = "better" if gain.value > 0 else "worse"
    points = _format_points(abs(gain.value), signed=False)
    return f"{text}: {points} points {direction} than the base model's {base}{interval}."


def metric_title(name: str) -> str:
    """The name of a metric in a sentence."""
    return _METRIC_TITLES.get(name, name)


def format_percent(value: float) -> str:
    """A share as a percentage; only a share of exactly 1 is shown as 100 %."""
    if not math.isfinite(value):
        return "–"
    shown = f"{value:.1%}"
    return f"{math.floor(value * 1000) / 10:.1f}%" if shown == "100.0%" and value < 1 else shown


def _format_points(value: float, signed: bool = True) -> str:
    if not math.isfinite(value):
        return "–"
    # With a typographic minus sign and without "-0.0".
    return f"{round(value * 100, 1) + 0.0:{'+' if signed else ''}.1f}".replace("-", "−")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_LENGTH else f"{text[:_MAX_TEXT_LENGTH]} … ({len(text):,} characters)"


def _counts(evaluation: Evaluation) -> dict[Outcome, int]:
    outcomes = [prediction.outcome for prediction in evaluation.predictions]
    return {kind: outcomes.count(kind) for kind in _OUTCOMES}


def _cards(predictions: Sequence[Prediction]) -> list[_Card]:
    cards, image_bytes = [], 0
    for prediction in _choose(predictions):
        images = prediction.sample.images
        thumbnails: list[str] = []
        for image in images[:_IMAGES_PER_SAMPLE]:
            thumbnail = _thumbnail(image) if image_bytes < _MAX_IMAGE_BYTES else None
            if thumbnail:
                image_bytes += len(thumbnail)
                thumbnails.append(thumbnail)
        cards.append(
            _Card(
                prediction,
                tuple(thumbnails),
                images_left_out=len(images) - len(thumbnails),
                is_pixel_art=all(max(image.width, image.height) <= _MAX_PIXEL_ART_SIDE for image in images),
            )
        )
    return cards


def _choose(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Choose the same number of samples of each outcome, so that a few broken samples are visible among many fixed."""
    order = random.Random(_SEED).sample(range(len(predictions)), len(predictions))  # noqa: S311
    queues: dict[Outcome, list[int]] = {}
    for number in order:
        queues.setdefault(predictions[number].outcome, []).append(number)
    chosen: list[int] = []
    while len(chosen) < _MAX_CARDS and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < _MAX_CARDS:
                chosen.append(queue.pop())
    return [predictions[number] for number in sorted(chosen)]


def _thumbnail(image_ref: ImageRef) -> str:
    """The image as a small JPEG in a data URL."""
    image = to_rgb(open_image(image_ref), "white")
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


@dataclass(frozen=True)
class _Matrix:
    """A confusion matrix for the page.

    Attributes:
        labels: Labels of the columns.
        short: Labels without the words that all labels have in common.
        rows: Count of each cell, and its share of the row.
    """

    labels: tuple[str, ...]
    short: tuple[str, ...]
    rows: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def is_wide(self) -> bool:
        """Whether the matrix is too wide to be beside the scores."""
        return len(self.labels) > _COLUMNS_BESIDE_SCORES

    @property
    def is_upright(self) -> bool:
        """Whether the headings of the columns are written downwards, because they are wider than the cells."""
        return any(len(label) > _LONGEST_LEVEL_LABEL for label in self.short)


def _matrix(confusion: Confusion) -> _Matrix:
    labels = confusion.labels
    has_other = any(row[-1] for row in confusion.counts)
    columns = len(labels) if has_other else len(labels) - 1
    rows = tuple(
        tuple((count, count / sum(row)) for count in row[:columns])
        for row, label in zip(confusion.counts, labels, strict=True)
        if label != OTHER
    )
    return _Matrix(labels[:columns], (*_without_common_words(labels[:-1]), "other")[:columns], rows)


def _without_common_words(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels without their common beginning and end: `The digit is 3.` becomes `3`."""
    words = [label.split(" ") for label in labels]
    common = next((place for place, column in enumerate(zip(*words, strict=False)) if len(set(column)) > 1), 0)
    rest = [" ".join(label[common:]) for label in words]
    ends = {re.sub(r".*\w", "", label, flags=re.DOTALL) for label in rest}
    end = len(ends.pop()) if len(ends) == 1 else 0
    trimmed = [label[: len(label) - end] for label in rest]
    return tuple(trimmed) if all(trimmed) else tuple(labels)
