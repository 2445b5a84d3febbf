"""What was prepared as a page: how long samples are, how many slices they have, and what the model sees of some.

One HTML file that needs nothing beside it and runs no script. The samples shown are read back from the shards, so the
page is what training gets, not what it should get. Every text from the data is escaped by the template.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.reports.pages import write_page
from minicpmv_finetune.shards.format import Manifest, ShardReader

_SHOWN: dict[Split, int] = {"train": 10, "eval": 2}
_SLICES_SHOWN = 40  # of a sample
_BARS = 30
_THUMBNAIL = 180  # longest side of a slice in pixels
_PIXEL_ART = 120  # a slice not larger than this is shown with sharp pixels
_LONGEST_TEXT = 1500


@dataclass(frozen=True)
class _Bar:
    """A bar of a histogram: values from `low` up to and with `high`."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class _Histogram:
    bars: tuple[_Bar, ...]
    mean: float
    percentiles: Mapping[int, int]

    @property
    def highest(self) -> int:
        return max((bar.count for bar in self.bars), default=1)


@dataclass(frozen=True)
class _Slice:
    """A slice on the sheet; `grid` is (rows, columns) of tokens where each sees one place of the image."""

    thumbnail: str
    width: int
    height: int
    first: int
    last: int
    grid: tuple[int, int] | None
    is_pixel_art: bool


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring tokens of one kind: `image`, `learnt` or `read`."""

    kind: str
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class _Sheet:
    """One sample of the preview."""

    split: Split
    id: str
    tokens: int
    stretches: tuple[_Stretch, ...]
    slices: tuple[_Slice, ...]
    left_out: int
    text: str


def write_report(path: Path, shards: Path, encoder: Encoder, slices: Sequence[int]) -> None:
    """Write the page.

    Args:
        path: receives it, whole or not at all.
        shards: finished shards.
        encoder: that made their tokens.
        slices: number of slices of each row, of all splits.
    """
    readers = {split: ShardReader(shards, split) for split in _SHOWN}
    manifest = readers["train"].manifest
    values = {
        "manifest": manifest,
        "tokens": _histogram([length for lengths in manifest.lengths.values() for length in lengths]),
        "slices": _histogram(slices),
        "sheets": [
            _sheet(readers[split][number], split, encoder)
            for split, count in _SHOWN.items()
            for number in _spread(len(readers[split]), count)
        ],
        "facts": _facts(manifest),
    }
    write_page(path, Path(__file__).parent, values)


def _facts(manifest: Manifest) -> dict[str, object]:
    return {
        "generation": f"MiniCPM-V {manifest.generation}",
        "most slices beside the overview": manifest.max_slice_nums,
        "longest sample allowed": f"{manifest.model_max_length:,} tokens",
        "images stored as": manifest.codec,
        "shards": len(manifest.files),
        "data": manifest.data_fingerprint[:16],
        "key": manifest.key,
    }


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` numbers below `total`, evenly spread."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def _histogram(values: Sequence[int]) -> _Histogram:
    if not values:
        return _Histogram((), 0.0, {})
    low, high = min(values), max(values)
    width = max(1, math.ceil((high - low + 1) / _BARS))
    counts, _ = np.histogram(values, bins=np.arange(low, high + width + 1, width))
    bars = tuple(
        _Bar(low + place * width, low + (place + 1) * width - 1, int(count)) for place, count in enumerate(counts)
    )
    found = np.percentile(values, (50, 90, 99, 100), method="inverted_cdf")
    return _Histogram(bars, float(np.mean(values)), dict(zip((50, 90, 99, 100), map(int, found), strict=True)))


def _sheet(row: ModelInput, split: Split, encoder: Encoder) -> _Sheet:
    image = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.image_token)
    kinds = [
        "image" if token == image else "read" if label == IGNORED_LABEL else "learnt"
        for token, label in zip(row.input_ids, row.labels, strict=True)
    ]
    stretches, start = [], 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        stretches.append(_Stretch(kind, start, start + length - 1))
        start += length
    seen = [stretch for stretch in stretches if stretch.kind == "image"]
    pairs = list(zip(row.slices, seen, strict=True))[:_SLICES_SHOWN]
    words = [token for token, kind in zip(row.input_ids, kinds, strict=True) if kind != "image"]
    text = str(encoder.tokenizer.decode(words, skip_special_tokens=True)).strip()
    return _Sheet(
        split=split,
        id=row.id,
        tokens=len(row.input_ids),
        stretches=tuple(stretches),
        slices=tuple(_slice(pixels, stretch, encoder.slicing.patch_size) for pixels, stretch in pairs),
        left_out=len(row.slices) - len(pairs),
        text=text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)",
    )


def _slice(pixels: NDArray[np.uint8], tokens: _Stretch, patch_size: int) -> _Slice:
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    is_pixel_art = max(width, height) <= _PIXEL_ART
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if is_pixel_art else "JPEG", quality=80)
    kind = "png" if is_pixel_art else "jpeg"
    return _Slice(
        thumbnail=f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}",
        width=width,
        height=height,
        first=tokens.first,
        last=tokens.last,
        grid=_token_grid(height // patch_size, width // patch_size, tokens.tokens),
        is_pixel_art=is_pixel_art,
    )


def _token_grid(rows: int, columns: int, tokens: int) -> tuple[int, int] | None:
    """How a slice's tokens lie over it, where each merges a square of patches; a resampler's see all of it."""
    side = math.isqrt(rows * columns // tokens) if tokens else 0
    if side in (1, 2, 4) and rows % side == 0 and columns % side == 0 and rows * columns == tokens * side * side:
        return rows // side, columns // side
    return None
