"""Read the user's data, check every sample, and write down what is wrong with the ones left out.

Samples flow through: they are parsed here, checked by a pool of processes a batch at a time, and written as they come
back, in their order. Only a window of them is in memory, and a few bytes of each stay (`inventory`): enough to
split off evaluation data, to find duplicates and to draw the report once all are known.
"""

import hashlib
import heapq
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import Accepted, addresses, check_all, forget_images
from minicpmv_finetune.data.reading import Record, read_records
from minicpmv_finetune.data.samples import (
    DATASET_FILE,
    DatasetInfo,
    ImageRef,
    Reject,
    RejectLog,
    Sample,
    SampleError,
    Split,
)
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.options import settings_from_options
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.workers import map_in_order

from .duplicates import Appearance, Group, Repetition, find_repeated
from .holdout import hold_out
from .inventory import Inventory
from .report import SHOWN_SAMPLES, Findings, warnings_about, write_report

DUPLICATES_FILE = "duplicates.jsonl"
_BATCH = 16  # samples that a process checks at once
_BATCH_LENGTH = 1 << 20  # characters of them, about: a sample may hold its images itself
_LISTED_SHARDS = 8  # whose members' places are remembered
_LISTED_REPETITIONS = 10_000


@dataclass(frozen=True)
class ValidationSettings:
    """What decides which samples pass and which become evaluation data.

    Attributes:
        max_reject_ratio: share of rejected samples above which the step fails.
        eval_fraction: share of images split off for evaluation when no evaluation data is given; 0 for none.
        seed: of that split.
        exif_transpose: whether images are turned as their EXIF orientation says, in training and evaluation. The
            published code ignores it, so whatever serves the model must then turn them too.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    max_reject_ratio: float = 0.05
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: int = 42
    exif_transpose: bool = False


def settings_from(options: Mapping[str, Any]) -> ValidationSettings:
    """The settings that a JSON object names; see `settings_from_options`."""
    return settings_from_options(
        ValidationSettings,
        options,
        "data_options",
        "eval_fraction and exif_transpose",
    )


def validate_data(
    data_uri: str,
    eval_data_uri: str,
    dataset: Path,
    rejects_file: Path,
    settings: ValidationSettings,
    report: Path | None = None,
) -> DatasetInfo:
    """Check the data and write the dataset folder that later steps rely on.

    Args:
        data_uri: JSON arrays or JSON Lines in MiniCPM-V's format; local or `s3://`, one file or a pattern of names.
        eval_data_uri: the same for evaluation; empty splits it off `data_uri`, by image.
        dataset: folder that receives `train.jsonl`, `eval.jsonl`, `duplicates.jsonl` and, last, `dataset.json`.
        rejects_file: receives what was left out and why, also when the step fails over it.
        settings: see there.
        report: receives a page about the data, or None.

    Returns:
        Counts and the content's fingerprint.

    Raises:
        UserError: nothing lies at a URI or it may not be read, nothing usable is left, too much was rejected, or a
            file breaks off.
        RetryableError: the store does not answer.
    """
    sources: list[tuple[Split, str]] = [("train", data_uri)]
    if eval_data_uri:
        sources.append(("eval", eval_data_uri))
    for _, uri in sources:
        storage.require_allowed(uri)
    rows: Counter[Split] = Counter()
    forget_images()
    _listed.cache_clear()
    with (
        tempfile.TemporaryDirectory(prefix="validate-data-") as scratch,
        storage.staged_folder(dataset) as staging,
        RejectLog(rejects_file) as rejects,
    ):
        with Inventory(Path(scratch) / "samples.jsonl", Path(scratch) / "grays") as inventory:
            for split, uri in sources:
                for outcome in _checked(uri, settings.exif_transpose):
                    if isinstance(outcome, Accepted):
                        inventory.add(outcome)
                        rows[split] += 1
                    else:
                        rejects.append(outcome, split)
                if not rows[split]:
                    rejects.refuse_nothing_left(split)
        rejects.refuse_too_many(len(inventory), settings.max_reject_ratio)
        if eval_data_uri:
            is_eval = np.arange(len(inventory)) >= rows["train"]
        else:
            is_eval = hold_out(inventory, settings.eval_fraction, settings.seed)
        groups, repeated = find_repeated(inventory, is_eval)
        info = DatasetInfo(
            fingerprint=_fingerprint(inventory, is_eval, settings.exif_transpose),
            rows={"train": int((~is_eval).sum()), "eval": int(is_eval.sum())},
            rejected=dict(rejects.counts),
            noted=dict(sorted((inventory.notes + repeated).items())),  # a sum of Counters leaves zeros out
            exif_transpose=settings.exif_transpose,
        )
        shown = inventory.shown()
        chosen = _choose(inventory)
        groups = groups[:_LISTED_REPETITIONS]
        named = shown["sample"][[row for group in groups for row in group.rows]].tolist()
        kept = _distribute(inventory, is_eval, staging, {*chosen, *named})
        repetitions = [_described(group, shown, is_eval, kept) for group in groups]
        lines = "".join(f"{repetition.model_dump_json()}\n" for repetition, _ in repetitions)
        (staging / DUPLICATES_FILE).write_text(lines, encoding="utf-8")
        if report:
            findings = Findings(
                info=info,
                data_uri=data_uri,
                eval_data_uri=eval_data_uri,
                sizes=np.stack([shown["width"], shown["height"]], axis=1),
                turns=inventory.turns,
                images=inventory.images,
                rejects=rejects.examples,
                repetitions=repetitions,
                samples=[("eval" if is_eval[number] else "train", kept[number]) for number in chosen],
            )
            write_report(report, findings)
        (staging / DATASET_FILE).write_text(info.model_dump_json(indent=1) + "\n")
    for warning in warnings_about(info):
        print(f"warning: {warning}", file=sys.stderr)
    report_outcome(
        f"{info.rows['train']:,} samples to train on, {info.rows['eval']:,} to evaluate, "
        f"{sum(info.rejected.values()):,} rejected"
    )
    return info


def _checked(pattern: str, exif_transpose: bool) -> Iterator[Accepted | Reject]:
    """All samples of some files, in order, accepted or rejected.

    Raises:
        UserError: a file breaks off, is missing or of another kind.
    """
    uris = storage.expand(pattern)
    paths = [_local_copy(uri) for uri in uris]
    last: Record | None = None

    def records() -> Iterator[Record]:
        nonlocal last
        for uri, path in zip(uris, paths, strict=True):
            for record in read_records(uri, path, bar.update):
                yield record
                if record.is_last:
                    last = record
                    return

    with progress("validate", sum(path.stat().st_size for path in paths), "B", unit_scale=True) as bar:
        for outcomes in _side_by_side(_batches(records()), exif_transpose):
            yield from outcomes
    if last and last.problem:
        place = f"line {last.line}" if last.index is None else f"sample {last.index}"
        raise UserError(f"{last.file}, {place}: {last.problem}")


def _local_copy(uri: str) -> Path:
    """A file of the data on this machine, since no store keeps a stream open while images are checked for hours."""
    if storage.is_object_uri(uri):
        return storage.fetch(uri)
    with storage.open_stream(uri):  # or say why not
        return Path(uri).expanduser()


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    length = 0
    for record in records:
        batch.append(record)
        length += record.length
        if len(batch) == _BATCH or length > _BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _side_by_side(batches: Iterator[list[Record]], exif_transpose: bool) -> Iterator[list[Accepted | Reject]]:
    """Check batches side by side, in order; a single one is checked here."""
    head = list(islice(batches, 2))
    calls = ((batch, _places(batch), exif_transpose) for batch in chain(head, batches))
    if len(head) < 2:
        yield from starmap(check_all, calls)
    else:
        yield from map_in_order("validate-data", check_all, calls)


def _places(batch: list[Record]) -> dict[str, image_files.Span | SampleError]:
    """Where the members of tar shards lie that a batch names."""
    places: dict[str, image_files.Span | SampleError] = {}
    for record in batch:
        for address in addresses(record):
            shard = image_files.shard_of(address)
            if shard:
                listed = _listed(shard)
                if isinstance(listed, SampleError):
                    places[address] = listed
                elif address in listed:
                    places[address] = listed[address]
    return places


@lru_cache(maxsize=_LISTED_SHARDS)
def _listed(shard: str) -> dict[str, image_files.Span] | SampleError:
    try:
        return image_files.list_shard(shard)
    except UserError as error:
        return SampleError("image_missing" if storage.is_supported(shard) else "image_refused", str(error))


def _fingerprint(inventory: Inventory, is_eval: NDArray[np.bool_], exif_transpose: bool) -> str:
    """A hash of content alone: the same data elsewhere, or in another order, has the same."""
    digest = hashlib.sha256(b"exif_transpose" if exif_transpose else b"")
    digests = inventory.digests()
    for split, belongs in {"train": ~is_eval, "eval": is_eval}.items():
        digest.update(split.encode())
        words = digests[belongs].view(">u8").reshape(-1, 4)
        digest.update(words[np.lexsort(words.T[::-1])].tobytes())
    return digest.hexdigest()


def _choose(inventory: Inventory) -> list[int]:
    """Samples for the report: a choice that only their contents decide."""
    digests = inventory.digests()
    smallest = heapq.nsmallest(SHOWN_SAMPLES, ((digests[number].tobytes(), number) for number in range(len(inventory))))
    return sorted(number for _, number in smallest)


def _distribute(inventory: Inventory, is_eval: NDArray[np.bool_], folder: Path, wanted: set[int]) -> dict[int, Sample]:
    """Write each sample into its split's file, and return those that are wanted."""
    kept = {}
    with (
        inventory.lines.open(encoding="utf-8") as lines,
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "eval.jsonl").open("w", encoding="utf-8") as evaluation,
    ):
        for number, line in enumerate(lines):
            (evaluation if is_eval[number] else train).write(line)
            if number in wanted:
                kept[number] = Sample.model_validate_json(line)
    return kept


def _described(
    group: Group, shown: NDArray[np.void], is_eval: NDArray[np.bool_], kept: Mapping[int, Sample]
) -> tuple[Repetition, tuple[ImageRef, ...]]:
    """A group as it is listed, and the images of its appearances."""
    appearances, found = [], []
    for row in group.rows:
        number = int(shown["sample"][row])
        sample = kept[number]
        image = sample.images[row - int(np.searchsorted(shown["sample"], number))]
        split: Split = "eval" if is_eval[number] else "train"
        appearances.append(Appearance(uri=image_files.shown(image.uri), split=split, sample=sample.id))
        found.append(image)
    repetition = Repetition(kind=group.kind, leaks=group.leaks, count=group.count, appearances=tuple(appearances))
    return repetition, tuple(found)
