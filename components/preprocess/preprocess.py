"""Slice every picture and tokenise every conversation once, so that no epoch does it again.

Samples flow through a small pool of threads (decoding, resizing and tokenising all leave Python's lock) in their
order, so the result does not depend on the number of threads, and only a window of them is in memory.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import storage
from ..minicpmv.conversation import Encoder
from ..minicpmv.row import IGNORED_LABEL, Row
from ..minicpmv.slicing import cut
from ..progress import conclude, progress
from ..samples import (
    Reject,
    Sample,
    SampleError,
    Split,
    open_picture,
    read_info,
    read_samples,
    refuse_nothing_left,
    refuse_too_many,
    write_rejects,
)
from ..shards import MANIFEST_FILE, Manifest, ShardWriter

_IN_FLIGHT = 4 * (os.cpu_count() or 1)  # samples; keeps every thread busy while rows are written
_SPLITS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides the shards, beside the data and the base model.

    Attributes:
        max_slice_nums: most slices of a picture; None takes the base model's own.
        model_max_length: longest sample in tokens; a longer one is rejected, never cut.
        max_reject_ratio: share of rejected samples above which the step fails.
    """

    max_slice_nums: int | None = 9
    model_max_length: int = 2048
    max_reject_ratio: float = 0.05


def preprocess(
    dataset: Path, base_model_uri: str, shards: Path, rejects_file: Path, settings: PreprocessSettings
) -> Manifest:
    """Write the shards of a validated dataset.

    Args:
        dataset: folder written by validate_data.
        base_model_uri: checkpoint whose template, tokenizer and slicing apply.
        shards: folder that receives the Parquet files and, last, `manifest.json`.
        rejects_file: receives what was left out and why, also when the step fails over it.
        settings: see there.

    Returns:
        The manifest.

    Raises:
        UserError: the base model is unusable, a picture changed, or too much was rejected.
    """
    info = read_info(dataset)
    base_model = storage.fetch(base_model_uri)
    encoder = Encoder.from_checkpoint(base_model, settings.max_slice_nums)
    rejects: dict[Split, list[Reject]] = {split: [] for split in _SPLITS}
    writers: dict[Split, ShardWriter] = {}
    with storage.staged_folder(shards) as staging:
        with progress("preprocess", sum(info.rows.values()), " samples") as bar:
            for split in _SPLITS:
                writer = writers[split] = ShardWriter(staging, split)
                for outcome in _prepared(read_samples(dataset, split), encoder, settings.model_max_length):
                    if isinstance(outcome, Reject):
                        rejects[split].append(outcome)
                    else:
                        writer.append(outcome)
                    bar.update()
                writer.close()
        rejected = [reject for split in _SPLITS for reject in rejects[split]]
        write_rejects(rejects_file, rejected)
        for split, writer in writers.items():
            if rejects[split] and not writer.lengths:
                refuse_nothing_left(rejects[split], split, rejects_file)
        accepted = sum(len(writer.lengths) for writer in writers.values())
        refuse_too_many(rejected, accepted, settings.max_reject_ratio, rejects_file)
        manifest = Manifest(
            generation=encoder.generation.version,
            tokenizer_sha256=hashlib.sha256((base_model / "tokenizer.json").read_bytes()).hexdigest(),
            max_slice_nums=encoder.slicing.max_slice_nums,
            model_max_length=settings.model_max_length,
            patch_size=encoder.slicing.patch_size,
            pad_token_id=encoder.pad_token_id,
            data_fingerprint=info.fingerprint,
            shards={split: writer.shards for split, writer in writers.items()},
            lengths={split: writer.lengths for split, writer in writers.items()},
            slices={split: writer.slices for split, writer in writers.items()},
            bytes=sum(path.stat().st_size for path in staging.glob("*.parquet")),
        )
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n")
    tokens = sum(sum(lengths) for lengths in manifest.lengths.values())
    conclude(
        f"{sum(manifest.slices.values()):,} slices and {tokens:,} tokens in {manifest.bytes / 1e6:,.1f} MB of shards"
    )
    return manifest


def markdown(manifest: Manifest) -> str:
    """The counts as a table."""
    rows = ""
    for split, lengths in manifest.lengths.items():
        counts = (len(lengths), manifest.slices[split], sum(lengths), max(lengths, default=0))
        rows += f"| {split} | {' | '.join(f'{count:,}' for count in counts)} |\n"
    return (
        f"MiniCPM-V {manifest.generation}, {manifest.bytes / 1e6:,.1f} MB of shards\n\n"
        f"| Split | Samples | Slices | Tokens | Longest |\n|---|---:|---:|---:|---:|\n{rows}"
    )


def prepare(sample: Sample, encoder: Encoder, model_max_length: int) -> Row:
    """Tokenise and slice one sample.

    Raises:
        SampleError: it would not fit, or holds a special token.
    """
    encoded = encoder.encode(sample)
    if len(encoded.input_ids) > model_max_length:
        raise SampleError(
            "too_long",
            f"{len(encoded.input_ids)} tokens do not fit model_max_length {model_max_length}; raise it, lower "
            "max_slice_nums or shorten the text.",
        )
    if all(label == IGNORED_LABEL for label in encoded.labels):
        raise SampleError("nothing_supervised", "no token of an answer is left to learn from; give it an answer.")
    plans = encoder.plan(sample)
    order = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    slices = [
        pixels
        for number in order
        for pixels in cut(open_picture(sample.pictures[number]), plans[number], encoder.slicing)
    ]
    return Row(sample.id, encoded.input_ids, encoded.labels, slices)


def _prepared(samples: Iterable[Sample], encoder: Encoder, model_max_length: int) -> Iterator[Row | Reject]:
    def outcome(sample: Sample) -> Row | Reject:
        try:
            return prepare(sample, encoder, model_max_length)
        except SampleError as error:
            return Reject(file=sample.source, index=sample.index, id=sample.id, reason=error.reason, message=str(error))

    waiting: deque[Future[Row | Reject]] = deque()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for sample in samples:
            waiting.append(pool.submit(outcome, sample))
            if len(waiting) == _IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
