"""The report of the prepared data: tokens and slices per sample, and what the model sees of some samples.

The report is one self-contained HTML file without scripts. The samples in it are read back from the shards, so the page
shows what training really gets. The template escapes every text from the data. A preview needs the tokenizer, and for
some codecs torch; so it is kept beside the shards, for the next run that finds them.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from minicpmv_finetune.data.samples import RejectLog, Split
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.reports.pages import write_page
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest

PREVIEWS_FILE = f"previews-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}.json"
"""Where previews are kept; another version of this module makes its own."""

_PREVIEWS: dict[Split, int] = {"train": 10, "eval": 2}  # number of samples
_SLICES_PER_PREVIEW = 40
_BARS = 30  # most bars of a histogram
_THUMBNAIL = 180  # longest side of a thumbnail in pixels
_PIXEL_ART = 120  # longest side in pixels of a slice that is enlarged with sharp pixels
_LONGEST_TEXT = 1500  # characters


@dataclass(frozen=True)
class _Bar:
    """A bar of a histogram: the number of values from `low` to `high`, both included."""

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
    """A slice in the preview of a sample.

    Attributes:
        thumbnail: Small copy of the slice as a `data:` URI.
        width: Width of the slice in pixels.
        height: Height of the slice in pixels.
        first: Position of the slice's first token in the sample.
        last: Position of the slice's last token.
        grid: (rows, columns) of the slice's tokens if each token covers one area of the slice, else None.
        is_pixel_art: Whether the slice is so small that it is enlarged with sharp pixels.
    """

    thumbnail: str
    width: int
    height: int
    first: int
    last: int
    grid: tuple[int, int] | None
    is_pixel_art: bool


@dataclass(frozen=True)
class _TokenRun:
    """Consecutive tokens of one kind: `image`, `supervised` or `context`."""

    kind: str
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Preview:
    """The preview of one sample."""

    split: Split
    id: str
    tokens: int
    runs: tuple[_TokenRun, ...]
    slices: tuple[_Slice, ...]
    left_out: int
    text: str


_KEPT = TypeAdapter(tuple[Preview, ...])


def dump_previews(previews: tuple[Preview, ...]) -> bytes:
    """Previews as JSON."""
    return _KEPT.dump_json(previews)


def load_previews(content: bytes) -> tuple[Preview, ...] | None:
    """Previews from JSON; None if there are none in it."""
    try:
        return _KEPT.validate_json(content)
    except ValidationError:
        return None


def preview_samples(shards: Path, encoder: Encoder) -> tuple[Preview, ...]:
    """Previews of some samples of each split.

    Args:
        shards: Folder of finished shards.
        encoder: The encoder that made the tokens of the shards.
    """
    readers = {split: ShardReader(shards, split) for split in _PREVIEWS}
    for reader in readers.values():
        # A thumbnail does not show where Pillow rounds differently from torchvision, whose imports take seconds.
        reader.slicing = replace(reader.slicing, resampler="pillow")
    return tuple(
        _preview(readers[split][number], split, encoder)
        for split, count in _PREVIEWS.items()
        for number in _evenly_spaced(len(readers[split]), count)
    )


def write_report(
    path: Path, shards: Path, previews: Sequence[Preview], slices: NDArray[np.int32], rejects: RejectLog
) -> None:
    """Write the page.

    Args:
        path: File to write; no incomplete file gets this name.
        shards: Folder of finished shards.
        previews: Previews of some samples.
        slices: Number of slices of each row of all splits.
        rejects: The rejected samples.
    """
    manifest = read_manifest(shards)
    values = {
        "manifest": manifest,
        "rejects": rejects,
        "tokens": _histogram(np.concatenate([np.asarray(lengths) for lengths in manifest.lengths.values()])),
        "slices": _histogram(slices),
        "previews": previews,
        "facts": _facts(manifest),
    }
    write_page(path, Path(__file__).parent, values)


def _facts(manifest: Manifest) -> dict[str, object]:
    return {
        "generation": f"MiniCPM-V {manifest.generation}",
        "max_slice_nums": manifest.max_slice_nums,
        "model_max_length": f"{manifest.model_max_length:,} tokens",
        "images stored as": manifest.codec,
        "shards": len(manifest.files),
        "data fingerprint": manifest.data_fingerprint[:16],
        "key": manifest.key,
    }


def _evenly_spaced(total: int, count: int) -> list[int]:
    """Up to `count` evenly spaced numbers below `total`."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def _histogram(values: NDArray[np.int32]) -> _Histogram:
    if not len(values):
        return _Histogram((), 0.0, {})
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - low + 1) / _BARS))
    counts, _ = np.histogram(values, bins=np.arange(low, high + width + 1, width))
    bars = tuple(
        _Bar(low + place * width, low + (place + 1) * width - 1, int(count)) for place, count in enumerate(counts)
    )
    found = np.percentile(values, (50, 90, 99, 100), method="inverted_cdf")
    return _Histogram(bars, float(np.mean(values)), dict(zip((50, 90, 99, 100), map(int, found), strict=True)))


def _preview(row: ModelInput, split: Split, encoder: Encoder) -> Preview:
    image_token = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.image_token)
    kinds = [
        "image" if token == image_token else "context" if label == IGNORED_LABEL else "supervised"
        for token, label in zip(row.input_ids, row.labels, strict=True)
    ]
    runs, start = [], 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        runs.append(_TokenRun(kind, start, start + length - 1))
        start += length
    image_runs = [run for run in runs if run.kind == "image"]
    pairs = list(zip(row.slices, image_runs, strict=True))[:_SLICES_PER_PREVIEW]
    structural = {encoder.tokenizer.convert_tokens_to_ids(token) for token in encoder.structural_tokens}
    text = encoder.decode([token for token in row.input_ids if token not in structural])
    return Preview(
        split=split,
        id=row.id,
        tokens=len(row.input_ids),
        runs=tuple(runs),
        slices=tuple(_slice(pixels, run, encoder.slicing.patch_size) for pixels, run in pairs),
        left_out=len(row.slices) - len(pairs),
        text=text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)",
    )


def _slice(pixels: NDArray[np.uint8], run: _TokenRun, patch_size: int) -> _Slice:
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
        first=run.first,
        last=run.last,
        grid=_token_grid(height // patch_size, width // patch_size, run.tokens),
        is_pixel_art=is_pixel_art,
    )


def _token_grid(rows: int, columns: int, tokens: int) -> tuple[int, int] | None:
    """The (rows, columns) of a slice's tokens if each token merges a square of patches.

    None for the tokens of a resampler, each of which sees the whole slice.
    """
    side = math.isqrt(rows * columns // tokens) if tokens else 0
    if side in (1, 2, 4) and rows % side == 0 and columns % side == 0 and rows * columns == tokens * side * side:
        return rows // side, columns // side
    return None
