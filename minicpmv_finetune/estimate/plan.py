"""The command `plan`: what a run costs, before a GPU is requested.

The estimate needs only the data's JSON, the headers of its images, and the base model's configuration and headers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.shards.codecs import CODECS, Codec
from minicpmv_finetune.shards.packing import Packs, group_by_tokens
from minicpmv_finetune.shards.sharing import Beginnings, share_images
from minicpmv_finetune.terminal import console

from .cost import (
    Loading,
    Model,
    Recipe,
    estimate_flops,
    estimate_main_memory,
    estimate_memory,
    packing_share,
    padding_share,
    read_model,
)
from .efficiency import PEAK_FLOPS, REFERENCE_GPU, expected_hours
from .layers import PUBLISHED_TARGETS, Targets
from .sample_sizes import SampleSize, measure_samples

_EXAMPLES = 5  # samples that are too long and listed
_LENGTHS = (1024, 2048, 4096, 8192, 16384)  # values of model_max_length to compare
_PERCENTILES = (50, 90, 99, 100)
_TOKEN_BYTES = 3  # of a token and its label in a shard, compressed
# Share of the slices' raw bytes, measured on photographs (docs/performance.md); flat drawings need far less.
_SHARE_OF_RAW: Mapping[Codec, float] = {"raw": 1.0, "webp-lossless": 0.4, "png": 0.5}


class LongSample(BaseModel):
    """A sample that is longer than model_max_length."""

    file: str
    index: int | None
    id: str
    tokens: int


class Estimate(BaseModel):
    """Everything that is known before a run; fields with `estimated` in the name are estimates, the others exact."""

    # `pictures` is the key in the JSON output since 0.1.0.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    generation: str
    samples: int = Field(description="Number of accepted samples, as far as headers show.")
    eval_samples: int = Field(description="Number of samples for evaluation; approximate if they are held out.")
    rejected: dict[str, int] = Field(description="Number of rejected samples by reason.")
    images: int = Field(alias="pictures")
    slices: int
    tokens: int
    token_percentiles: dict[int, int]
    slice_percentiles: dict[int, int]
    model_max_length: int
    too_long: int = Field(description="Number of samples that model_max_length rejects.")
    longest: list[LongSample] = Field(description="The longest of these samples.")
    too_long_at: dict[int, int] = Field(description="Number of samples that other values would reject.")
    estimated_shard_bytes: dict[str, int] = Field(description="Size of the shards by image codec.")
    padding_waste: float = Field(
        description="Share of padding in batches in random order; those filled by tokens have none."
    )
    packing_waste: float = Field(description="The same for samples packed into rows of model_max_length.")
    tokens_per_batch: int = Field(default=0, description="Largest number of tokens of a batch; 0 if it counts samples.")
    batches: int = Field(default=0, description="Number of such batches in an epoch.")
    tokens_in_a_batch: float = Field(default=0.0, description="Mean number of tokens of such a batch.")
    rows: int = Field(default=0, description="Number of rows, if samples with the same image share one; otherwise 0.")
    shared_tokens: int = Field(default=0, description="Number of tokens of the samples that these rows do not repeat.")
    parameters: int = Field(description="Number of all parameters, adapters included.")
    active_parameters: int = Field(description="Parameters that compute a token; in a mixture of experts not all do.")
    trained_parameters: int
    devices: int
    steps: int
    estimated_gpu_bytes: dict[str, int] = Field(description="Memory of each GPU by strategy, without checkpointing.")
    estimated_gpu_bytes_with_checkpointing: dict[str, int]
    estimated_flops: float = Field(description="FLOPs of the whole training, with checkpointing.")
    strategy: str = Field(description="Strategy of the run, a name in estimated_gpu_bytes.")
    checkpointing: bool = Field(description="Whether the run uses checkpointing.")
    estimated_main_memory_bytes: int = Field(
        default=0, description="Main memory of each machine at the start with FSDP2; 0 for other strategies."
    )
    estimated_gpu_hours: float = Field(description="GPU hours of the whole training on an H100, all GPUs together.")


def estimate_run(
    data_uri: str,
    eval_data_uri: str,
    base_model_uri: str,
    max_slice_nums: int,
    model_max_length: int,
    eval_fraction: float,
    exif_transpose: bool,
    recipe: Recipe,
    targets: Targets = PUBLISHED_TARGETS,
    checkpointing: bool = False,
    strategy: str = "single GPU",
    loading: Loading | None = None,
) -> Estimate:
    """Estimate the cost of a run.

    Args:
        data_uri: Training data, as for validate_data.
        eval_data_uri: Evaluation data, as for validate_data; empty if there is none.
        base_model_uri: Base checkpoint.
        max_slice_nums: Maximum number of slices of an image, besides its overview.
        model_max_length: Maximum length of a sample in tokens.
        eval_fraction: Share of the images that is held out if there is no evaluation data.
        exif_transpose: Whether images are rotated by their EXIF orientation.
        recipe: Settings of the training.
        targets: Which layers get adapters.
        checkpointing: Whether activations are computed again in the backward pass.
        strategy: Name of the run's strategy in the estimate of memory.
        loading: How the weights are loaded into main memory, where FSDP2 divides them from there.

    Returns:
        What the data contains, and what its training takes.

    Raises:
        UserError: Data or base model cannot be read, or no sample can be used.
    """
    base = storage.fetch(base_model_uri)
    encoder = Encoder.from_checkpoint(base, max_slice_nums)
    model = read_model(base, targets)
    rejected: Counter[str] = Counter()
    splits = [list(measure_samples(uri, encoder, exif_transpose, rejected)) for uri in (data_uri, eval_data_uri) if uri]
    measured = [sample for samples in splits for sample in samples]
    too_long = [sample for sample in measured if sample.tokens > model_max_length]
    if too_long:
        rejected["too_long"] = len(too_long)
    fitting = [sample for sample in measured if sample.tokens <= model_max_length]
    if not fitting:
        raise UserError(_nothing_usable(data_uri, measured, rejected))
    held_out = [sample for sample in splits[1] if sample.tokens <= model_max_length] if eval_data_uri else []
    eval_samples = len(held_out) if eval_data_uri else round(eval_fraction * len(fitting))
    main_memory = model.file_bytes + estimate_main_memory(model, recipe, loading) if loading else 0
    return Estimate(
        generation=encoder.generation.version,
        rejected=dict(sorted(rejected.items())),
        model_max_length=model_max_length,
        too_long=len(too_long),
        longest=_longest(too_long),
        too_long_at=_count_too_long_at(measured, model_max_length),
        estimated_shard_bytes=_estimate_shard_bytes(fitting, encoder.slicing.patch_size),
        packing_waste=packing_share([sample.tokens for sample in fitting], model_max_length),
        **_count_samples(fitting, eval_samples),
        strategy=strategy,
        checkpointing=checkpointing,
        estimated_main_memory_bytes=int(main_memory),
        **_estimate_training(model, recipe, fitting, len(fitting) - eval_samples, checkpointing, model_max_length),
    )


def _nothing_usable(data_uri: str, measured: Sequence[SampleSize], rejected: Counter[str]) -> str:
    shortest = f"; the shortest has {min(sample.tokens for sample in measured):,} tokens" if measured else ""
    return f"{data_uri}: no usable sample{shortest}; rejected: {dict(rejected) or 'none'}; fix the data."


class _SampleCounts(TypedDict):
    """The fields of an estimate that count samples, images, slices and tokens."""

    samples: int
    eval_samples: int
    images: int
    slices: int
    tokens: int
    token_percentiles: dict[int, int]
    slice_percentiles: dict[int, int]


def _count_samples(samples: Sequence[SampleSize], eval_samples: int) -> _SampleCounts:
    lengths = [sample.tokens for sample in samples]
    return {
        "samples": len(samples),
        "eval_samples": eval_samples,
        "images": sum(sample.images for sample in samples),
        "slices": sum(sample.slices for sample in samples),
        "tokens": sum(lengths),
        "token_percentiles": _percentiles(lengths),
        "slice_percentiles": _percentiles([sample.slices for sample in samples]),
    }


class _TrainingCosts(TypedDict):
    """The fields of an estimate that depend on the settings of the training."""

    padding_waste: float
    tokens_per_batch: int
    batches: int
    tokens_in_a_batch: float
    rows: int
    shared_tokens: int
    parameters: int
    active_parameters: int
    trained_parameters: int
    devices: int
    steps: int
    estimated_gpu_bytes: dict[str, int]
    estimated_gpu_bytes_with_checkpointing: dict[str, int]
    estimated_flops: float
    estimated_gpu_hours: float


def _estimate_training(
    model: Model,
    recipe: Recipe,
    samples: Sequence[SampleSize],
    train_samples: int,
    checkpointing: bool,
    model_max_length: int,
) -> _TrainingCosts:
    all_tokens = sum(sample.tokens for sample in samples)
    if recipe.share_images:
        share = train_samples / len(samples)
        samples = _share_rows(samples, recipe.tokens_per_batch or model_max_length)
        train_samples = math.ceil(share * len(samples))
    flops = _estimate_training_flops(model, recipe, samples, train_samples, checkpointing)
    lengths = [sample.tokens for sample in samples]
    groups = group_by_tokens(lengths, recipe.tokens_per_batch, recipe.devices) if recipe.tokens_per_batch else Packs([])
    batches = math.ceil(len(groups) * train_samples / len(samples))
    largest = _largest_batch(samples, groups, recipe.batch_size)
    adapters = model.adapters(recipe)
    return {
        "padding_waste": 0.0 if groups else padding_share(lengths, recipe.batch_size),
        "tokens_per_batch": recipe.tokens_per_batch,
        "batches": batches,
        "tokens_in_a_batch": sum(lengths) / len(groups) if groups else 0.0,
        "rows": len(samples) if recipe.share_images else 0,
        "shared_tokens": all_tokens - sum(lengths),
        "parameters": model.total + adapters,
        "active_parameters": model.active + adapters,
        "trained_parameters": model.trained(recipe),
        "devices": recipe.devices,
        "steps": _count_steps(batches or math.ceil(train_samples / recipe.batch_size), recipe),
        "estimated_gpu_bytes": _estimate_gpu_bytes(model, recipe, *largest, checkpointing=False),
        "estimated_gpu_bytes_with_checkpointing": _estimate_gpu_bytes(model, recipe, *largest, checkpointing=True),
        "estimated_flops": _estimate_training_flops(model, recipe, samples, train_samples, checkpointing=True),
        "estimated_gpu_hours": expected_hours(model, flops, PEAK_FLOPS[REFERENCE_GPU]),
    }


def _share_rows(samples: Sequence[SampleSize], capacity: int) -> list[SampleSize]:
    """The rows of samples that share their images, each as the size of its first sample with the tokens of all."""
    lengths = [sample.tokens for sample in samples]
    images = share_images(Beginnings.of(sample.beginning for sample in samples), lengths, capacity)
    tokens = images.lengths(lengths)
    return [replace(samples[group[0]], tokens=size) for group, size in zip(images.groups, tokens, strict=True)]


def _count_too_long_at(samples: Sequence[SampleSize], model_max_length: int) -> dict[int, int]:
    """How many samples other maximum lengths would reject."""
    counts = {length: sum(sample.tokens > length for sample in samples) for length in _LENGTHS}
    return {length: count for length, count in counts.items() if length != model_max_length and count}


def print_estimate(estimate: Estimate) -> None:
    """Print an estimate as tables."""
    to = console()
    to.print(_data_table(estimate))
    for sample in estimate.longest:
        place = "" if sample.index is None else f", sample {sample.index}"
        to.print(f"  too long: {sample.file}{place} ({sample.id}): {sample.tokens:,} tokens")
    devices = f"{estimate.devices} GPU{'s' if estimate.devices > 1 else ''}"
    table = Table(title=f"Memory of each GPU, about, of {devices}", title_justify="left", box=None)
    for name in ("", "plain", "with checkpointing"):
        table.add_column(name, justify="right" if name else "left")
    for strategy, size in estimate.estimated_gpu_bytes.items():
        table.add_row(strategy, _size(size), _size(estimate.estimated_gpu_bytes_with_checkpointing[strategy]))
    to.print()
    to.print(table)


def _data_table(estimate: Estimate) -> Table:
    table = Table(title=f"MiniCPM-V {estimate.generation}", title_justify="left", box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    percentiles = {
        name: " · ".join(f"{'most' if share == 100 else f'{share} %'} {value:,}" for share, value in values.items())
        for name, values in {"tokens": estimate.token_percentiles, "slices": estimate.slice_percentiles}.items()
    }
    memories = (
        estimate.estimated_gpu_bytes_with_checkpointing if estimate.checkpointing else estimate.estimated_gpu_bytes
    )
    memory = memories[estimate.strategy]
    rows = {
        "samples": f"{estimate.samples:,}, of them {estimate.eval_samples:,} to evaluate",
        "rejected": ", ".join(f"{reason} {count:,}" for reason, count in estimate.rejected.items()) or "none",
        "slices": f"{estimate.slices:,} of {estimate.images:,} images ({percentiles['slices']} a sample)",
        "tokens": f"{estimate.tokens:,} ({percentiles['tokens']} a sample)",
        f"longer than {estimate.model_max_length:,}": f"{estimate.too_long:,} samples"
        + "".join(f"; than {length:,}: {count:,}" for length, count in estimate.too_long_at.items()),
        "shards": ", ".join(f"{codec} {_size(size)}" for codec, size in estimate.estimated_shard_bytes.items()),
        "padding": f"{estimate.padding_waste:.1%} of a batch, {estimate.packing_waste:.1%} when packed",
        **({"shared images": _sharing(estimate)} if estimate.rows else {}),
        **({"batches": _batches(estimate)} if estimate.tokens_per_batch else {}),
        "parameters": f"{estimate.parameters:,}, of them trained {estimate.trained_parameters:,}"
        + (f", active {estimate.active_parameters:,}" if estimate.active_parameters < estimate.parameters else ""),
        "training": f"{estimate.steps:,} steps, about {estimate.estimated_flops:.2g} FLOPs, "
        f"{estimate.estimated_gpu_hours:,.2g} GPU hours on {REFERENCE_GPU}s",
        "this run": f"{estimate.strategy}{', with checkpointing' * estimate.checkpointing}: {_size(memory)} a GPU",
    }
    if estimate.estimated_main_memory_bytes:
        rows["main memory"] = f"{_size(estimate.estimated_main_memory_bytes)} on each machine while FSDP2 starts"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sharing(estimate: Estimate) -> str:
    share = estimate.shared_tokens / estimate.tokens
    return f"{estimate.rows:,} rows; {estimate.shared_tokens:,} tokens ({share:.0%}) are not computed again"


def _batches(estimate: Estimate) -> str:
    return (
        f"{estimate.batches:,} in an epoch, of at most {estimate.tokens_per_batch:,} tokens, on average "
        f"{estimate.tokens_in_a_batch:,.0f} ({estimate.tokens_in_a_batch / estimate.tokens_per_batch:.0%}), "
        "without padding"
    )


def _percentiles(values: Sequence[int]) -> dict[int, int]:
    found = np.percentile(values, _PERCENTILES, method="inverted_cdf")
    return dict(zip(_PERCENTILES, map(int, found), strict=True))


def _longest(samples: Sequence[SampleSize]) -> list[LongSample]:
    longest = sorted(samples, key=lambda sample: -sample.tokens)[:_EXAMPLES]
    return [LongSample(file=sample.file, index=sample.index, id=sample.id, tokens=sample.tokens) for sample in longest]


def _estimate_shard_bytes(samples: Sequence[SampleSize], patch_size: int) -> dict[str, int]:
    raw = 3 * patch_size**2 * sum(sample.patches for sample in samples)
    text = _TOKEN_BYTES * sum(sample.tokens for sample in samples)
    sources = sum(sample.image_bytes for sample in samples)
    return {codec: text + (sources if codec == "source" else int(raw * _SHARE_OF_RAW[codec])) for codec in CODECS}


def _count_steps(batches: int, recipe: Recipe) -> int:
    """Number of optimizer steps of a training, by the number of one epoch's batches of all devices."""
    return math.ceil(math.ceil(batches / recipe.devices) / recipe.accumulation_steps * recipe.epochs)


def _largest_batch(samples: Sequence[SampleSize], groups: Sequence[Sequence[int]], batch_size: int) -> tuple[int, int]:
    """The most tokens and the most patches of a batch; `groups` are the batches that are filled by tokens, if any."""
    if groups:
        sizes = [[samples[number] for number in group] for group in groups]
        tokens = max(sum(sample.tokens for sample in batch) for batch in sizes)
        return tokens, max(sum(sample.patches for sample in batch) for batch in sizes)
    tokens = max(sample.tokens for sample in samples)
    return batch_size * tokens, batch_size * max(sample.patches for sample in samples)


def _estimate_gpu_bytes(model: Model, recipe: Recipe, tokens: int, patches: int, checkpointing: bool) -> dict[str, int]:
    sizes = estimate_memory(model, recipe, tokens, patches, checkpointing)
    return {strategy: int(size) for strategy, size in sizes.items()}


def _estimate_training_flops(
    model: Model, recipe: Recipe, samples: Sequence[SampleSize], train_samples: int, checkpointing: bool
) -> float:
    lengths, patches = [sample.tokens for sample in samples], sum(sample.patches for sample in samples)
    share = train_samples / len(samples)
    return recipe.epochs * share * estimate_flops(model, recipe, lengths, patches, checkpointing)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
