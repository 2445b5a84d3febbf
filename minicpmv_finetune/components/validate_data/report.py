"""The data as a page one wants to read: one HTML file that needs nothing beside it, and tables in Markdown.

Every text from the data is escaped by the template, and a content security policy lets no script run and nothing be
loaded from anywhere. The page stays below some 10 MB at any number of samples: it shows a choice of them.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.data.image_files import to_rgb
from minicpmv_finetune.data.samples import DatasetInfo, ImageRef, Reject, Sample, Split, open_image
from minicpmv_finetune.minicpmv.slicing import SlicingConfig, plan_slices
from minicpmv_finetune.reports.pages import write_page

from .duplicates import Repetition

SHOWN_SAMPLES = 60
_SHOWN_REPETITIONS = 40
_IMAGES_PER_SAMPLE = 4
_IMAGES_PER_REPETITION = 6
_THUMBNAIL = 360  # longest side in pixels
_PIXEL_ART = 160  # an image not larger than this is shown with sharp pixels
_LONGEST_TEXT = 600  # characters
_MANY = 10  # turns or images; more are one bar
_SIDES = (0, 112, 224, 448, 896, 1344, 1792, 2688, 4032)  # pixels
_SHAPES = {"1:4": 1 / 4, "1:2": 1 / 2, "3:4": 3 / 4, "1:1": 1.0, "4:3": 4 / 3, "2:1": 2.0, "4:1": 4.0}
_NOTES = {
    "exif_rotated": "samples with an image that EXIF says to turn",
    "cmyk": "samples with an image in CMYK, converted as Pillow does",
    "palette": "samples with an image of palette colours",
    "transparent": "samples with an image that is transparent somewhere, or could be",
    "order_by_text": "samples whose text names the images in another order than their list; the text decides",
    "duplicate_samples": "samples equal to an earlier one of their split",
    "equal_pictures": "images that lie at several addresses, or in both splits",
    "near_equal_pictures": "images that look like another",
    "leaked_equal": "evaluation samples with an image that training shows too",
    "leaked_near": "evaluation samples with an image that looks like one of training",
}


@dataclass(frozen=True)
class Findings:
    """What the page shows.

    Attributes:
        info: counts and fingerprint.
        data_uri: where the data came from.
        eval_data_uri: where the evaluation data came from; empty if it was held out.
        sizes: (width, height) of each image of each sample.
        turns: number of samples by their number of turns.
        images: number of samples by their number of images.
        rejects: the first few of each reason.
        repetitions: images that occur more than once, and some of them.
        samples: a choice of samples, each with its split.
    """

    info: DatasetInfo
    data_uri: str
    eval_data_uri: str
    sizes: NDArray[np.uint32]
    turns: Mapping[int, int]
    images: Mapping[int, int]
    rejects: Mapping[str, Sequence[Reject]]
    repetitions: Sequence[tuple[Repetition, Sequence[ImageRef]]]
    samples: Sequence[tuple[Split, Sample]]


@dataclass(frozen=True)
class _Histogram:
    title: str
    bars: tuple[tuple[str, int], ...]

    @property
    def highest(self) -> int:
        return max((count for _, count in self.bars), default=0) or 1


@dataclass(frozen=True)
class _Thumbnail:
    """A small image; `grid` is the (rows, columns) it is sliced into, `aspect` its width over its height."""

    source: str
    aspect: float
    grid: tuple[int, int]
    is_pixel_art: bool
    caption: str


def write_report(path: Path, findings: Findings) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: an image changed meanwhile.
        RetryableError: the store does not answer.
    """
    repetitions = [
        (repetition, [_thumbnail(image) for image in shown[:_IMAGES_PER_REPETITION]])
        for repetition, shown in findings.repetitions[:_SHOWN_REPETITIONS]
    ]
    samples = [
        (split, sample, [_thumbnail(image) for image in sample.images[:_IMAGES_PER_SAMPLE]])
        for split, sample in findings.samples
    ]
    values = {
        "findings": findings,
        "info": findings.info,
        "accepted": sum(findings.info.rows.values()),
        "rejected": sum(findings.info.rejected.values()),
        "notes": _NOTES,
        "warnings": warnings_about(findings.info),
        "histograms": _histograms(findings),
        "repetitions": repetitions,
        "samples": samples,
        "slicing": SlicingConfig(),
    }
    write_page(path, Path(__file__).parent, values, {"shortened": _shortened, "thousands": lambda count: f"{count:,}"})


def markdown(info: DatasetInfo) -> str:
    """The counts as tables."""
    rows = "".join(f"| {split} | {count:,} |\n" for split, count in info.rows.items())
    text = f"| Split | Samples |\n|---|---:|\n{rows}"
    if info.rejected:
        reasons = "".join(f"| {reason} | {count:,} |\n" for reason, count in sorted(info.rejected.items()))
        text += f"\n| Rejected because of | Samples |\n|---|---:|\n{reasons}"
    if info.noted:
        notes = "".join(f"| {_NOTES.get(code, code)} | {count:,} |\n" for code, count in info.noted.items())
        text += f"\n| Noted | |\n|---|---:|\n{notes}"
    text += "".join(f"\n**Warning:** {warning}\n" for warning in warnings_about(info))
    return f"{text}\nFingerprint of the content: `{info.fingerprint}`\n"


def warnings_about(info: DatasetInfo) -> list[str]:
    """What a person should know before training on it, a sentence each."""
    noted, held_out = info.noted, info.rows.get("eval", 0)
    warnings = []
    for code, what in {
        "leaked_equal": "that training shows too",
        "leaked_near": "that looks like one of training",
    }.items():
        if count := noted.get(code):
            warnings.append(
                f"{count:,} of {held_out:,} evaluation samples show an image {what}, so their score says less about "
                "new images; duplicates.jsonl in the dataset names them."
            )
    if info.exif_transpose:
        warnings.append(
            "exif_transpose turns images as EXIF says, in training and evaluation; whatever serves the model must "
            "turn them too."
        )
    elif count := noted.get("exif_rotated"):
        warnings.append(
            f"{count:,} samples show images that EXIF says to turn, and the model sees them unturned, as with the "
            "published code; exif_transpose turns them, and then whatever serves the model must too."
        )
    return warnings


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _histograms(findings: Findings) -> list[_Histogram]:
    sizes, counts = np.unique(findings.sizes.astype(np.int64), axis=0, return_counts=True)
    longest = np.histogram(sizes.max(axis=1, initial=0), (*_SIDES, np.inf), weights=counts)[0]
    shapes = np.log(list(_SHAPES.values()))
    aspects = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    nearest = np.abs(aspects[:, None] - shapes).argmin(axis=1)
    shape_counts = np.bincount(nearest, weights=counts, minlength=len(shapes))
    slices = [len(plan_slices(width, height, SlicingConfig()).target_sizes) for width, height in sizes.tolist()]
    slice_counts = np.bincount(slices, weights=counts, minlength=SlicingConfig().max_slice_nums + 2)
    labels = [f"{low or 1}–{high - 1}" for low, high in pairwise(_SIDES)] + [f"{_SIDES[-1]}+"]
    return [
        _Histogram("Longer side in pixels", _bars(labels, longest)),
        _Histogram("Shape, width to height", _bars(list(_SHAPES), shape_counts)),
        _Histogram("Slices of an image", _bars([str(n) for n in range(1, len(slice_counts))], slice_counts[1:])),
        _Histogram("Images of a sample", _counted(findings.images, 0)),
        _Histogram("Turns of a sample", _counted(findings.turns, 2)),
    ]


def _bars(labels: Sequence[str], counts: NDArray[Any]) -> tuple[tuple[str, int], ...]:
    return tuple((label, int(count)) for label, count in zip(labels, counts, strict=True))


def _counted(counts: Mapping[int, int], least: int) -> tuple[tuple[str, int], ...]:
    highest = max((number for number in counts if number <= _MANY), default=least)
    bars = [(str(number), counts.get(number, 0)) for number in range(least, highest + 1)]
    more = sum(count for number, count in counts.items() if number > _MANY)
    return (*bars, (f"{_MANY + 1}+", more)) if more else tuple(bars)


def _thumbnail(image_ref: ImageRef) -> _Thumbnail:
    image = to_rgb(open_image(image_ref), "white")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=82)
    plan = plan_slices(image_ref.width, image_ref.height, SlicingConfig())
    grid = plan.grid or (1, 1)
    slices = f", {grid[0]} × {grid[1]} slices" if plan.grid else ""
    return _Thumbnail(
        source=f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}",
        aspect=image.width / image.height,
        grid=grid,
        is_pixel_art=max(image_ref.width, image_ref.height) <= _PIXEL_ART,
        caption=f"{image_ref.width} × {image_ref.height}{slices}",
    )
