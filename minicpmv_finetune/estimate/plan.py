"""What a run will take, before any GPU is claimed: from the data's JSON, its images' headers and the base's config.

The samples are read and judged by validate_data's own code, with an image's header in place of its pixels, and
tokenized by preprocess's; so the token counts are preprocess's own. What only pixels tell (a truncated file, equal
images) is left to validate_data.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import InspectedImage, check_record, image_addresses, image_problem
from minicpmv_finetune.data.reading import Record, read_records
from minicpmv_finetune.data.samples import ImageRef, Reject, Sample, SampleError
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.codecs import CODECS, Codec
from minicpmv_finetune.shards.encoding import count_slices, image_order, tokenize
from minicpmv_finetune.workers import map_in_order

from . import cost
from .cost import Model, Recipe

_HEADER_BYTES = 2**16  # of an image; a header that is longer is read with the whole file
_BATCH = 64  # samples a process handles at once
_EXAMPLES = 5
_MOST_TOKENS = 2**31  # nothing is too long while lengths are counted
_CONTEXTS = (1024, 2048, 4096, 8192, 16384)
_PERCENTILES = (50, 90, 99, 100)
_TOKEN_BYTES = 3  # of a token and its label in a shard, compressed
# Of the slices' raw bytes, measured on photographs (docs/performance.md); flat drawings take far less.
_SHARE_OF_RAW: Mapping[Codec, float] = {"raw": 1.0, "webp-lossless": 0.4, "png": 0.5}


class Longest(BaseModel):
    """A sample that does not fit."""

    file: str
    index: int | None
    id: str
    tokens: int


class Plan(BaseModel):
    """All that is known beforehand; what an estimate is has `estimated` in its name."""

    # `pictures` is what the JSON output has called it since 0.1.0.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    generation: str
    samples: int = Field(description="accepted ones, as far as headers tell")
    eval_samples: int = Field(description="of them for evaluation; about, when they are to be held out")
    rejected: dict[str, int] = Field(description="by reason")
    images: int = Field(alias="pictures")
    slices: int
    tokens: int
    token_percentiles: dict[int, int]
    slice_percentiles: dict[int, int]
    model_max_length: int
    too_long: int = Field(description="samples that model_max_length rejects")
    longest: list[Longest] = Field(description="the longest of them")
    too_long_at: dict[int, int] = Field(description="samples that other lengths would reject")
    estimated_shard_bytes: dict[str, int] = Field(description="by image codec")
    padding_waste: float = Field(description="share of a batch's tokens that are padding, in random order")
    packing_waste: float = Field(description="the same, samples packed into rows of model_max_length")
    parameters: int
    trained_parameters: int
    devices: int
    steps: int
    estimated_gpu_bytes: dict[str, int] = Field(description="of each device, by strategy, without checkpointing")
    estimated_gpu_bytes_with_checkpointing: dict[str, int]
    estimated_flops: float = Field(description="of the whole training, with checkpointing")


@dataclass(frozen=True)
class _Found:
    """What one sample comes to."""

    tokens: int
    slices: int
    patches: int
    image_bytes: int
    images: int
    file: str
    index: int | None
    id: str


def plan(
    data_uri: str,
    eval_data_uri: str,
    base_model_uri: str,
    max_slice_nums: int,
    model_max_length: int,
    eval_fraction: float,
    exif_transpose: bool,
    recipe: Recipe,
) -> Plan:
    """Work out what a run will take.

    Args:
        data_uri: as validate_data takes it.
        eval_data_uri: as validate_data takes it.
        base_model_uri: base checkpoint.
        max_slice_nums: most slices of an image beside its overview.
        model_max_length: longest sample in tokens.
        eval_fraction: share of the images that is held out when there is no evaluation data.
        exif_transpose: whether images are turned as their EXIF orientation says.
        recipe: how it will be trained.

    Raises:
        UserError: data or base model cannot be read, or no sample is left.
    """
    base = storage.fetch(base_model_uri)
    encoder = Encoder.from_checkpoint(base, max_slice_nums)
    model = cost.read_model(base)
    rejected: Counter[str] = Counter()
    groups = {
        uri: list(_accepted(uri, encoder, exif_transpose, rejected)) for uri in filter(None, (data_uri, eval_data_uri))
    }
    found = [sample for group in groups.values() for sample in group]
    fitting = [sample for sample in found if sample.tokens <= model_max_length]
    too_long = [sample for sample in found if sample.tokens > model_max_length]
    if not fitting:
        longest = f"; the shortest takes {min(sample.tokens for sample in found):,} tokens" if found else ""
        raise UserError(f"{data_uri}: no usable sample{longest}; rejected were {dict(rejected) or 'none'}; mend them.")
    if eval_data_uri:
        evaluated = sum(sample.tokens <= model_max_length for sample in groups[eval_data_uri])
    else:
        evaluated = round(eval_fraction * len(fitting))
    trained = len(fitting) - evaluated
    lengths = [sample.tokens for sample in fitting]
    patches = [sample.patches for sample in fitting]
    steps = math.ceil(math.ceil(trained / (recipe.devices * recipe.batch)) / recipe.accumulation * recipe.epochs)
    largest = recipe.batch * max(lengths), recipe.batch * max(patches)

    def memory(checkpointing: bool) -> dict[str, int]:
        return {name: int(size) for name, size in cost.memory(model, recipe, *largest, checkpointing).items()}

    return Plan(
        generation=encoder.generation.version,
        samples=len(fitting),
        eval_samples=evaluated,
        rejected=dict(sorted({**rejected, **({"too_long": len(too_long)} if too_long else {})}.items())),
        images=sum(sample.images for sample in fitting),
        slices=sum(sample.slices for sample in fitting),
        tokens=sum(lengths),
        token_percentiles=_percentiles(lengths),
        slice_percentiles=_percentiles([sample.slices for sample in fitting]),
        model_max_length=model_max_length,
        too_long=len(too_long),
        longest=[
            Longest(file=sample.file, index=sample.index, id=sample.id, tokens=sample.tokens)
            for sample in sorted(too_long, key=lambda sample: -sample.tokens)[:_EXAMPLES]
        ],
        too_long_at={
            length: count
            for length in _CONTEXTS
            if length != model_max_length and (count := sum(sample.tokens > length for sample in found))
        },
        estimated_shard_bytes=_shard_bytes(fitting, encoder.slicing.patch_size),
        padding_waste=cost.padding_waste(lengths, recipe.batch),
        packing_waste=cost.packing_waste(lengths, model_max_length),
        parameters=model.total,
        trained_parameters=model.trained(recipe),
        devices=recipe.devices,
        steps=steps,
        estimated_gpu_bytes=memory(checkpointing=False),
        estimated_gpu_bytes_with_checkpointing=memory(checkpointing=True),
        estimated_flops=_flops(model, recipe, lengths, sum(patches), trained),
    )


def show(planned: Plan) -> None:
    """Print a plan as tables."""
    console = Console(highlight=False)
    table = Table(title=f"MiniCPM-V {planned.generation}", title_justify="left", box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    percentiles = {
        name: " · ".join(f"{'most' if share == 100 else f'{share} %'} {value:,}" for share, value in values.items())
        for name, values in {"tokens": planned.token_percentiles, "slices": planned.slice_percentiles}.items()
    }
    rows = {
        "samples": f"{planned.samples:,}, of them {planned.eval_samples:,} to evaluate",
        "rejected": ", ".join(f"{reason} {count:,}" for reason, count in planned.rejected.items()) or "none",
        "slices": f"{planned.slices:,} of {planned.images:,} images ({percentiles['slices']} a sample)",
        "tokens": f"{planned.tokens:,} ({percentiles['tokens']} a sample)",
        f"longer than {planned.model_max_length:,}": f"{planned.too_long:,} samples"
        + "".join(f"; than {length:,}: {count:,}" for length, count in planned.too_long_at.items()),
        "shards": ", ".join(f"{codec} {_size(size)}" for codec, size in planned.estimated_shard_bytes.items()),
        "padding": f"{planned.padding_waste:.1%} of a batch, {planned.packing_waste:.1%} when packed",
        "parameters": f"{planned.parameters:,}, of them trained {planned.trained_parameters:,}",
        "training": f"{planned.steps:,} steps, about {planned.estimated_flops:.2g} FLOPs",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for sample in planned.longest:
        place = "" if sample.index is None else f", sample {sample.index}"
        console.print(f"  too long: {sample.file}{place} ({sample.id}): {sample.tokens:,} tokens", markup=False)
    devices = f"{planned.devices} GPU{'s' if planned.devices > 1 else ''}"
    gpus = Table(title=f"Memory of each GPU, about, of {devices}", title_justify="left", box=None)
    for name in ("", "plain", "with checkpointing"):
        gpus.add_column(name, justify="right" if name else "left")
    for strategy, size in planned.estimated_gpu_bytes.items():
        gpus.add_row(strategy, _size(size), _size(planned.estimated_gpu_bytes_with_checkpointing[strategy]))
    console.print()
    console.print(gpus)


def _accepted(pattern: str, encoder: Encoder, exif_transpose: bool, rejected: Counter[str]) -> Iterator[_Found]:
    uris = storage.expand(pattern)
    paths = [storage.fetch(uri) for uri in uris]
    with progress("plan", sum(path.stat().st_size for path in paths), "B", unit_scale=True) as bar:
        records = (
            record for uri, path in zip(uris, paths, strict=True) for record in read_records(uri, path, bar.update)
        )
        found = map_in_order("plan", _work, _batches(records), _start, (encoder, exif_transpose))
        for outcome in chain.from_iterable(found):
            if isinstance(outcome, _Found):
                yield outcome
            else:
                rejected[outcome] += 1


def _batches(records: Iterator[Record]) -> Iterator[tuple[list[Record]]]:
    while batch := list(islice(records, _BATCH)):
        yield (batch,)


_encoder: Encoder
_turn: bool


def _start(encoder: Encoder, exif_transpose: bool) -> None:
    global _encoder, _turn
    _encoder, _turn = encoder, exif_transpose
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(records: Sequence[Record]) -> list[_Found | str]:
    """What each item comes to, or the code it is rejected for."""
    if any(storage.is_object_uri(address) for record in records for address in image_addresses(record)):
        # A store answers many requests in the time of one.
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(_count, records))
    return [_count(record) for record in records]


def _count(record: Record) -> _Found | str:
    sizes: dict[str, int] = {}
    outcome = check_record(record, lambda address: _look(address, sizes))
    if isinstance(outcome, Reject):
        return outcome.reason
    sample = Sample.model_validate_json(outcome.line)
    try:
        tokens = len(tokenize(sample, _encoder, _MOST_TOKENS).input_ids)
    except SampleError as error:
        return error.reason
    plans = _encoder.plan(sample)
    return _Found(
        tokens=tokens,
        slices=count_slices(sample, _encoder),
        patches=sum(rows * columns for number in image_order(sample) for rows, columns in plans[number].target_sizes),
        image_bytes=sum(sizes.values()),
        images=len(sample.images),
        file=sample.source,
        index=sample.index,
        id=sample.id,
    )


def _look(address: str, sizes: dict[str, int]) -> InspectedImage | SampleError:
    """An image by its header alone."""
    try:
        head, sizes[address], span = _head(address)
    except UserError as error:
        return SampleError("image_missing", str(error))
    try:
        try:
            image = image_files.open_header(head)
        except Exception:
            image = image_files.open_header(image_files.read(address, span))
        rotated = _turn and image_files.has_exif_rotation(image)
        problem = image_problem(image, address)
    except Image.DecompressionBombError as error:
        return SampleError("decompression_bomb", str(error))
    except Exception as error:
        return SampleError("image_unreadable", f"{image_files.shortened(address)}: {error}")
    if problem:
        return problem
    width, height = image.size
    if rotated and image.getexif().get(0x0112, 1) >= 5:  # EXIF orientations that lie on their side
        width, height = height, width
    ref = ImageRef(uri=address, sha256="", width=width, height=height, span=span, rotated=rotated)
    return InspectedImage(ref, b"", ())


def _head(address: str) -> tuple[bytes, int, image_files.Span | None]:
    """The first bytes of an image, how many it has, and its byte range in its archive."""
    archive = image_files.archive_of(address)
    if archive:
        span = _listed(archive).get(address)
        if span is None:
            raise UserError(f"{address}: the archive holds no such file.")
        return storage.read_bytes(archive, (span[0], min(span[1], _HEADER_BYTES))), span[1], span
    if image_files.is_data_uri(address):
        content = image_files.read(address)
        return content, len(content), None
    size = storage.size(address)
    return storage.read_bytes(address, (0, min(size, _HEADER_BYTES))), size, None


@lru_cache(maxsize=8)
def _listed(archive: str) -> dict[str, image_files.Span]:
    return image_files.list_archive(archive)


def _percentiles(values: Sequence[int]) -> dict[int, int]:
    found = np.percentile(values, _PERCENTILES, method="inverted_cdf")
    return dict(zip(_PERCENTILES, map(int, found), strict=True))


def _shard_bytes(found: Sequence[_Found], patch_size: int) -> dict[str, int]:
    raw = 3 * patch_size**2 * sum(sample.patches for sample in found)
    text = _TOKEN_BYTES * sum(sample.tokens for sample in found)
    sources = sum(sample.image_bytes for sample in found)
    return {codec: text + (sources if codec == "source" else int(raw * _SHARE_OF_RAW[codec])) for codec in CODECS}


def _flops(model: Model, recipe: Recipe, lengths: Sequence[int], patches: int, trained: int) -> float:
    share = trained / len(lengths)
    return recipe.epochs * share * cost.flops(model, recipe, lengths, patches, checkpointing=True)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
