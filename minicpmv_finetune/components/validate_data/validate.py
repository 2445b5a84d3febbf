"""Read the user's data, check every sample, and list the rejected ones with the reason.

Samples are processed as a stream: this process parses them, a pool of processes checks them in batches, and the
results are written in the order of the samples. Only a window of samples is in memory; compact facts of each stay in
files (`inventory`): enough to split off evaluation data, to find duplicates and to draw the report at the end.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import AcceptedSample, check_records, clear_image_cache, image_addresses
from minicpmv_finetune.data.other_formats import describe_ignored
from minicpmv_finetune.data.reading import Record, local_copy, read_records, require_source
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
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.options import Accepted, check_settings, settings_from_options
from minicpmv_finetune.outputs import claimed_folder
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.step_runs import step_run
from minicpmv_finetune.workers import map_in_order

from .duplicates import Appearance, Group, Repetition, find_repeated
from .holdout import hold_out
from .inventory import Inventory, in_order, marked
from .report import REPORTED_SAMPLES, Findings, data_warnings, write_report

DUPLICATES_FILE = "duplicates.jsonl"
_BATCH = 16  # samples that a process checks at once
_BATCH_LENGTH = 1 << 20  # characters of a batch, about: a sample may contain its images itself
_CACHED_ARCHIVES = 8  # archives whose list of members is kept in memory


@dataclass(frozen=True)
class ValidationSettings:
    """The settings that decide which samples pass and which become evaluation data.

    Attributes:
        max_reject_ratio: Share of rejected samples above which the step fails.
        eval_fraction: Share of the images split off for evaluation when no evaluation data is given; 0 for none.
        seed: Seed of the split.
        exif_transpose: Whether images are rotated as their EXIF orientation says, in training and evaluation. The
            published code ignores the orientation, so a server of the model must then rotate images too.
    """

    max_reject_ratio: Annotated[float, Accepted(at_least=0, at_most=1)] = 0.05
    eval_fraction: Annotated[float, Accepted(at_least=0, below=1)] = 0.1
    seed: Annotated[int, Accepted(at_least=0, at_most=2**32 - 1)] = 42
    exif_transpose: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


def settings_from(options: Mapping[str, Any]) -> ValidationSettings:
    """The settings that a JSON object names; see `settings_from_options`."""
    return settings_from_options(ValidationSettings, options, "data_options")


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
        eval_data_uri: The same for evaluation; empty splits it off `data_uri`, by image.
        dataset: Folder that receives `train.jsonl`, `eval.jsonl`, `duplicates.jsonl` and, last, `dataset.json`.
        rejects_file: File that receives each rejected sample with the reason, also when the step fails.
        settings: Settings of the checks and the split.
        report: File that receives the report page, or None; also when the data is refused.

    Returns:
        Counts, and the fingerprint of the content.

    Raises:
        UserError: There is no file at a URI or it may not be read, no usable sample is left, too many were rejected,
            or a file is not valid JSON as a whole.
        RetryableError: The store does not answer.
    """
    sources = _sources(data_uri, eval_data_uri)
    clear_image_cache()
    _list_archive.cache_clear()
    inputs = {"--data": data_uri, "--eval-data": eval_data_uri}
    with (
        step_run("validate-data") as run,
        tempfile.TemporaryDirectory(prefix="validate-data-") as scratch,
        claimed_folder(dataset, "validate-data", inputs, [rejects_file, *([report] if report else [])]) as output,
        output.assembled() as staging,
        RejectLog(rejects_file) as rejects,
    ):
        run.log_parameters({"data_uri": data_uri, "eval_data_uri": eval_data_uri or "none", **asdict(settings)})
        run.log_parameters({"git_commit": git_commit()})
        inventory = Inventory(Path(scratch))
        refusal, is_eval = _check_and_split(sources, inventory, rejects, settings)
        findings = _write_dataset(staging, inventory, is_eval, rejects, data_uri, eval_data_uri, settings)
        info = findings.info
        run.log_metrics(_figures(info))
        if report:
            write_report(report, replace(findings, refusal=str(refusal or "")))
            run.log_report(report, "data.html")
        if refusal:
            report_outcome(_outcome(info))
            raise refusal
        run.log_parameters({"data_fingerprint": info.fingerprint})
        (staging / DATASET_FILE).write_text(info.model_dump_json(indent=1) + "\n")
    _print_findings(info)
    return info


def _sources(data_uri: str, eval_data_uri: str) -> list[tuple[Split, str]]:
    """The data of each split.

    Raises:
        UserError: There is no file at a URI, or it may not be read.
    """
    sources: list[tuple[Split, str]] = [("train", data_uri)]
    if eval_data_uri:
        sources.append(("eval", eval_data_uri))
    for _, uri in sources:
        storage.require_allowed(uri)
        require_source(uri)
    return sources


def _print_findings(info: DatasetInfo) -> None:
    for warning in data_warnings(info):
        print_sentence(f"warning: {warning}")
    if info.ignored_fields:
        print_sentence(f"note: {describe_ignored(info.ignored_fields)}")
    report_outcome(_outcome(info))


def _check_and_split(
    sources: Sequence[tuple[Split, str]], inventory: Inventory, rejects: RejectLog, settings: ValidationSettings
) -> tuple[UserError | None, NDArray[np.bool_]]:
    """Check all samples, and decide which are for evaluation.

    Returns:
        Why the data is refused, or None; and for each accepted sample whether it is for evaluation.

    Raises:
        UserError: The data is refused before a single sample was found.
    """
    rows: Counter[Split] = Counter()
    refusal: UserError | None = None
    try:
        _check_sources(sources, inventory, rejects, settings, rows)
        if len(sources) == 1:
            return None, hold_out(inventory, settings.eval_fraction, settings.seed)
    except UserError as error:
        if not rows and not rejects.counts:
            raise
        refusal = error
    return refusal, np.arange(len(inventory)) >= rows["train"]


def _outcome(info: DatasetInfo) -> str:
    """The counts in one line, with the number of rejects of each reason."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(info.rejected).most_common())
    return (
        f"{info.rows['train']:,} samples to train on, {info.rows['eval']:,} to evaluate, "
        f"{sum(info.rejected.values()):,} rejected{f' ({reasons})' if reasons else ''}"
    )


def _figures(info: DatasetInfo) -> dict[str, float]:
    """The counts by name, for MLflow."""
    figures = {f"samples/{split}": count for split, count in info.rows.items()}
    for kind, counts in {"rejected": info.rejected, "noted": info.noted}.items():
        figures |= {f"{kind}/{code}": count for code, count in counts.items()}
    return dict(figures)


def _check_sources(
    sources: Iterable[tuple[Split, str]],
    inventory: Inventory,
    rejects: RejectLog,
    settings: ValidationSettings,
    rows: Counter[Split],
) -> None:
    """Check all samples, and add the accepted ones to the inventory and to the number of their split.

    Raises:
        UserError: A split has no usable sample, or too many samples were rejected.
    """
    with inventory:
        for split, uri in sources:
            for outcome in _check_files(uri, settings.exif_transpose):
                if isinstance(outcome, AcceptedSample):
                    inventory.add(outcome)
                    rows[split] += 1
                else:
                    rejects.append(outcome, split)
            if not rows[split]:
                rejects.refuse_nothing_left(split)
    rejects.refuse_too_many(len(inventory), settings.max_reject_ratio)


def _write_dataset(
    folder: Path,
    inventory: Inventory,
    is_eval: NDArray[np.bool_],
    rejects: RejectLog,
    data_uri: str,
    eval_data_uri: str,
    settings: ValidationSettings,
) -> Findings:
    """Write the samples of both splits and the duplicates, and return the content of the report."""
    groups, duplicate_counts = find_repeated(inventory, is_eval)
    images = inventory.image_rows()
    numbers = np.ascontiguousarray(images["sample"])
    chosen = _choose_for_report(inventory)
    listed = numbers[[row for group in groups for row in group.rows]].tolist()
    samples = _write_splits(inventory, is_eval, folder, {*chosen, *listed})
    repetitions = [_repetition(group, numbers, is_eval, samples) for group in groups]
    lines = "".join(f"{repetition.model_dump_json()}\n" for repetition, _ in repetitions)
    (folder / DUPLICATES_FILE).write_text(lines, encoding="utf-8")
    info = DatasetInfo(
        fingerprint=_fingerprint(inventory, is_eval, settings.exif_transpose),
        rows={"train": int((~is_eval).sum()), "eval": int(is_eval.sum())},
        rejected=dict(rejects.counts),
        noted=dict(sorted((inventory.notes + duplicate_counts).items())),  # a sum of Counters drops zeros
        with_images=_count_with_images(inventory, is_eval),
        ignored_fields=dict(sorted(inventory.ignored.items())),
        exif_transpose=settings.exif_transpose,
    )
    return Findings(
        info=info,
        data_uri=data_uri,
        eval_data_uri=eval_data_uri,
        sizes=np.stack([images["width"], images["height"]], axis=1),
        turns=inventory.turns,
        images=inventory.images,
        rejects=rejects.examples,
        repetitions=repetitions,
        samples=[("eval" if is_eval[number] else "train", samples[number]) for number in chosen],
    )


def _count_with_images(inventory: Inventory, is_eval: NDArray[np.bool_]) -> dict[Split, int]:
    has_image = marked(inventory.image_rows()["sample"], len(inventory))
    return {"train": int((has_image & ~is_eval).sum()), "eval": int((has_image & is_eval).sum())}


def _check_files(pattern: str, exif_transpose: bool) -> Iterator[AcceptedSample | Reject]:
    """Check all samples of the files that match a pattern, in order.

    Raises:
        UserError: A file is missing, is not valid JSON as a whole, or is of another kind.
    """
    uris = storage.expand(pattern)
    paths = [local_copy(uri) for uri in uris]
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
        for outcomes in _check_batches(_batches(records()), exif_transpose):
            yield from outcomes
    if last and last.problem:
        place = f"line {last.line}" if last.index is None else f"sample {last.index}"
        raise UserError(f"{last.file}, {place}: {last.problem}")


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


def _check_batches(batches: Iterator[list[Record]], exif_transpose: bool) -> Iterator[list[AcceptedSample | Reject]]:
    """Check batches in a pool of processes, in order; a single batch is checked in this process."""
    head = list(islice(batches, 2))
    calls = ((batch, _member_spans(batch), exif_transpose) for batch in chain(head, batches))
    if len(head) < 2:
        yield from starmap(check_records, calls)
    else:
        yield from map_in_order("validate-data", check_records, calls)


def _member_spans(batch: list[Record]) -> dict[str, image_files.Span | SampleError]:
    """The byte ranges of the archive members that a batch names."""
    spans: dict[str, image_files.Span | SampleError] = {}
    for record in batch:
        for address in image_addresses(record):
            archive = image_files.archive_of(address)
            if archive:
                members = _list_archive(archive)
                if isinstance(members, SampleError):
                    spans[address] = members
                elif span := members.get(address):
                    spans[address] = span
    return spans


@lru_cache(maxsize=_CACHED_ARCHIVES)
def _list_archive(archive: str) -> image_files.Members | SampleError:
    try:
        return image_files.list_archive(archive)
    except UserError as error:
        return SampleError("image_missing" if storage.is_supported(archive) else "image_refused", str(error))


def _fingerprint(inventory: Inventory, is_eval: NDArray[np.bool_], exif_transpose: bool) -> str:
    """A hash of the content alone: the same data at another address or in another order has the same fingerprint."""
    digest = hashlib.sha256(b"exif_transpose" if exif_transpose else b"")
    digests = inventory.digests()
    for split, side in {"train": False, "eval": True}.items():
        digest.update(split.encode())
        for numbers in in_order(digests):
            digest.update(digests[numbers[is_eval[numbers] == side]].tobytes())
    return digest.hexdigest()


def _choose_for_report(inventory: Inventory) -> list[int]:
    """Choose samples for the report; the choice depends only on the samples' content."""
    numbers = chain.from_iterable(in_order(inventory.digests()))
    return sorted(int(number) for number in islice(numbers, REPORTED_SAMPLES))


def _write_splits(
    inventory: Inventory, is_eval: NDArray[np.bool_], folder: Path, wanted: set[int]
) -> dict[int, Sample]:
    """Write each sample into the file of its split, and return the wanted samples by number."""
    samples = {}
    with (
        inventory.lines.open(encoding="utf-8") as lines,
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "eval.jsonl").open("w", encoding="utf-8") as evaluation,
    ):
        for number, line in enumerate(lines):
            (evaluation if is_eval[number] else train).write(line)
            if number in wanted:
                samples[number] = Sample.model_validate_json(line)
    return samples


def _repetition(
    group: Group, numbers: NDArray[np.uint32], is_eval: NDArray[np.bool_], samples: Mapping[int, Sample]
) -> tuple[Repetition, tuple[ImageRef, ...]]:
    """A group as `duplicates.jsonl` lists it, and the image of each appearance.

    Args:
        group: The group.
        numbers: Number of the sample of each row of `Inventory.image_rows`.
        is_eval: Whether each sample is for evaluation.
        samples: The samples of the group's rows, by number.
    """
    appearances, found = [], []
    for row in group.rows:
        number = int(numbers[row])
        sample = samples[number]
        image = sample.images[row - int(np.searchsorted(numbers, numbers[row]))]
        split: Split = "eval" if is_eval[number] else "train"
        appearances.append(Appearance(uri=image_files.shortened(image.uri), split=split, sample=sample.id))
        found.append(image)
    repetition = Repetition(kind=group.kind, leaks=group.leaks, count=group.count, appearances=tuple(appearances))
    return repetition, tuple(found)
