"""The report of the data: one self-contained HTML file, and tables in Markdown.

The template escapes every text from the data, and a content security policy forbids scripts and loading from other
places. The page shows a selection of the samples, so it stays below about 10 MB for any number of samples.
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
from minicpmv_finetune.reports.markdown import escape
from minicpmv_finetune.reports.pages import write_page

from .duplicates import Repetition

REPORTED_SAMPLES = 60
_REPORTED_REPETITIONS = 40
_IMAGES_PER_SAMPLE = 4
_IMAGES_PER_REPETITION = 6
_THUMBNAIL = 360  # longest side in pixels
_PIXEL_ART = 160  # longest side in pixels of an image that is enlarged with sharp pixels
_LONGEST_TEXT = 600  # characters
_MANY = 10  # turns or images; all larger numbers share one bar
_SIDES = (0, 112, 224, 448, 896, 1344, 1792, 2688, 4032)  # pixels
_SHAPES = {"1:4": 1 / 4, "1:2": 1 / 2, "3:4": 3 / 4, "1:1": 1.0, "4:3": 4 / 3, "2:1": 2.0, "4:1": 4.0}
_SPLITS: dict[Split, str] = {"train": "training", "eval": "evaluation"}
_NOTES = {
    "exif_rotated": "samples with an image that EXIF says to rotate",
    "cmyk": "samples with an image in CMYK, converted by Pillow",
    "palette": "samples with an image of palette colors",
    "transparent": "samples with an image that has an alpha channel or a transparent color",
    "untrained_answer": "samples with an answer that is neither trained nor scored, because it has loss false",
    "early_reasoning": "samples with reasoning before the last answer, which MiniCPM-V 4.5 leaves out",
    "order_by_text": "samples whose text shows the images in another order than their list; the text decides",
    "duplicate_samples": "samples equal to an earlier one of their split",
    "equal_pictures": "images that occur at several addresses, or in both splits",
    "near_equal_pictures": "images that look the same as another",
    "partly_compared": "images that resemble so many others that they were compared with some of them only",
    "leaked_equal": "evaluation samples with an image that is in the training data too",
    "leaked_near": "evaluation samples with an image that looks the same as one in the training data",
}


@dataclass(frozen=True)
class Findings:
    """The content of the report.

    Attributes:
        info: Counts and fingerprint of the dataset.
        data_uri: URI of the data.
        eval_data_uri: URI of the evaluation data; empty if it was held out.
        sizes: (width, height) of each image of each sample.
        turns: Number of samples by their number of turns.
        images: Number of samples by their number of images.
        rejects: The first rejects of each reason.
        repetitions: Images that occur more than once, each with the images of its first appearances.
        samples: A selection of samples, each with its split.
        refusal: Why the data is refused; empty if it is not.
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
    refusal: str = ""


@dataclass(frozen=True)
class _Histogram:
    title: str
    bars: tuple[tuple[str, int], ...]

    @property
    def highest(self) -> int:
        return max((count for _, count in self.bars), default=0) or 1


@dataclass(frozen=True)
class _Thumbnail:
    """A small copy of an image.

    Attributes:
        source: The copy as a `data:` URI.
        aspect: Width divided by height.
        grid: (rows, columns) of the slices that the image is cut into.
        is_pixel_art: Whether the image is so small that it is enlarged with sharp pixels.
        caption: Text below the image.
    """

    source: str
    aspect: float
    grid: tuple[int, int]
    is_pixel_art: bool
    caption: str


def write_report(path: Path, findings: Findings) -> None:
    """Write the page; no incomplete file gets the final name.

    Raises:
        UserError: An image changed after its validation.
        RetryableError: The store does not answer.
    """
    repetitions = [
        (repetition, [_thumbnail(image) for image in images[:_IMAGES_PER_REPETITION]])
        for repetition, images in findings.repetitions[:_REPORTED_REPETITIONS]
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
        "warnings": data_warnings(findings.info),
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
        reasons = "".join(f"| `{reason}` | {count:,} |\n" for reason, count in sorted(info.rejected.items()))
        text += f"\n| Rejected because of | Samples |\n|---|---:|\n{reasons}"
    if info.noted:
        notes = "".join(f"| {escape(_NOTES.get(code, code))} | {count:,} |\n" for code, count in info.noted.items())
        text += f"\n| Noted | |\n|:---|---:|\n{notes}"
    text += "".join(f"\n**Warning:** {escape(warning)}\n" for warning in data_warnings(info))
    return f"{text}\nFingerprint of the content: `{info.fingerprint}`\n"


def data_warnings(info: DatasetInfo) -> list[str]:
    """Warnings for the reader before training on the data, a sentence each."""
    noted, evaluated = info.noted, info.rows.get("eval", 0)
    warnings = []
    for split, name in _SPLITS.items():
        if info.rows.get(split) and info.with_images.get(split) == 0:
            warnings.append(
                f"none of the {info.rows[split]:,} {name} samples shows an image; if they should, name it in the field "
                "image."
            )
    for code, which in {
        "leaked_equal": "that is in the training data too",
        "leaked_near": "that looks the same as one in the training data",
    }.items():
        if count := noted.get(code):
            warnings.append(
                f"{count:,} of {evaluated:,} evaluation samples show an image {which}, so their score says less about "
                "new images; duplicates.jsonl in the dataset lists them."
            )
    if info.exif_transpose:
        warnings.append(
            "exif_transpose rotates images as EXIF says, in training and evaluation; the server of the model must "
            "rotate them too."
        )
    elif count := noted.get("exif_rotated"):
        warnings.append(
            f"{count:,} samples show images that EXIF says to rotate, and the model sees them without rotation, as "
            "with the published code; exif_transpose rotates them, and then the server of the model must too."
        )
    return warnings


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _histograms(findings: Findings) -> list[_Histogram]:
    # As one number each, of which a million are sorted in a fifth of the memory that rows take.
    both, counts = np.unique(findings.sizes.view(np.uint64), return_counts=True)
    sizes = both.view(np.uint32).reshape(-1, 2).astype(np.int64)
    longest = np.histogram(sizes.max(axis=1, initial=0), (*_SIDES, np.inf), weights=counts)[0]
    shapes = np.log(list(_SHAPES.values()))
    aspects = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    nearest = np.abs(aspects[:, None] - shapes).argmin(axis=1)
    shape_counts = np.bincount(nearest, weights=counts, minlength=len(shapes))
    slices = np.fromiter(
        (len(plan_slices(int(width), int(height), SlicingConfig()).target_sizes) for width, height in sizes),
        np.int64,
        len(sizes),
    )
    slice_counts = np.bincount(slices, weights=counts, minlength=SlicingConfig().max_slice_nums + 2)
    labels = [f"{low or 1}–{high - 1}" for low, high in pairwise(_SIDES)] + [f"{_SIDES[-1]}+"]
    of_images = [
        _Histogram("Longer side in pixels", _bars(labels, longest)),
        _Histogram("Shape, width to height", _bars(list(_SHAPES), shape_counts)),
        _Histogram("Slices of an image", _bars([str(n) for n in range(1, len(slice_counts))], slice_counts[1:])),
    ]
    return [
        *(of_images if len(sizes) else []),
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
