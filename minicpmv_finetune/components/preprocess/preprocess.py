"""Slice every image and tokenize every conversation once, so that no epoch does it again.

The data is cut into shards that do not depend on who writes them (`work`). Processes write one each; a finished
shard moves to the store of its key (`store`) while the next is written, and what is found there is not written again.
So the same mechanism resumes a killed attempt, shares the work between pods, and reuses what an earlier run prepared.
Last comes the manifest.
"""

import gc
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import (
    DatasetInfo,
    Reject,
    RejectLog,
    Sample,
    SampleError,
    Split,
    read_image,
    read_info,
)
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.shards.codecs import DEFAULT_CODEC, Codec
from minicpmv_finetune.shards.encoding import count_slices, store, tokenize
from minicpmv_finetune.shards.format import CACHE_NAME, MANIFEST_FILE, Manifest, StoredRow, slicing_fields, write_shard
from minicpmv_finetune.workers import CONTEXT, cores, worker_pool

from .finished_shards import ShardStore
from .report import write_report
from .shard_tasks import SPLITS, RejectedRow, ShardRecord, ShardTask, Work, plan_work, samples_of

_READ_AHEAD = 8  # samples whose images are on their way
_READING_THREADS = 4
_LOOKS_A_SECOND = 5


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides the shards, beside the data and the base model.

    Attributes:
        max_slice_nums: most slices of an image; None takes the base model's own.
        model_max_length: longest sample in tokens; a longer one is rejected, never cut.
        max_reject_ratio: share of rejected samples above which the step fails.
        codec: how images are stored.
    """

    max_slice_nums: int | None = 9
    model_max_length: int = 2048
    max_reject_ratio: float = 0.05
    codec: Codec = DEFAULT_CODEC


@dataclass(frozen=True)
class _Job:
    """What is to be done, and with what."""

    dataset: Path
    info: DatasetInfo
    encoder: Encoder
    settings: PreprocessSettings
    tokenizer_sha256: str
    work: Work
    store: ShardStore


def preprocess(
    dataset: Path,
    base_model_uri: str,
    shards: Path,
    rejects_file: Path,
    settings: PreprocessSettings,
    cache_uri: str = "",
    num_workers: int = 0,
    report: Path | None = None,
) -> Manifest:
    """Write the shards of a validated dataset, or find them where they were written before.

    Args:
        dataset: folder written by validate_data.
        base_model_uri: checkpoint whose template, tokenizer and slicing apply.
        shards: folder that receives the manifest, and the Parquet files where the cache is a local folder.
        rejects_file: receives what was left out and why, also when the step fails over it.
        settings: see there.
        cache_uri: folder or `s3://` URI where finished shards are kept for later runs; by default beside `shards`.
        num_workers: processes; 0 for as many as there are cores.
        report: HTML file to write.

    Returns:
        The manifest.

    Raises:
        UserError: the base model is unusable, an image changed, or too much was rejected.
        RetryableError: the store does not answer, or a process was killed.
    """
    job = _job(dataset, base_model_uri, settings, cache_uri or str(shards.absolute().parent / CACHE_NAME))
    found = job.store.finished(job.work.tasks)
    was_ready = len(found) == len(job.work.tasks)
    found |= _write_missing(job, job.work.tasks, found, num_workers)
    records = [found[task.name] for task in job.work.tasks]
    manifest = _manifest(job, found)
    with RejectLog(rejects_file) as rejects:
        for split, reject in _rejects(job, found):
            rejects.append(reject, split)
        for split in SPLITS:
            if job.info.rows.get(split) and not manifest.rows(split):
                rejects.refuse_nothing_left(split)
        rejects.refuse_too_many(sum(manifest.rows(split) for split in SPLITS), settings.max_reject_ratio)
    with storage.staged_folder(shards) as staging:
        location = job.store.hand_over(staging, records)
        manifest = manifest.model_copy(update={"location": location})
        content = json.dumps(manifest.model_dump(), indent=1) + "\n"
        (staging / MANIFEST_FILE).write_text(content)
    storage.write_bytes(storage.join(job.store.uri, MANIFEST_FILE), content.encode())
    if report:
        write_report(report, shards, job.encoder, [count for record in records for count in record.slices])
    tokens = sum(sum(lengths) for lengths in manifest.lengths.values())
    report_outcome(
        f"{sum(manifest.slices.values()):,} slices and {tokens:,} tokens in {manifest.bytes / 1e6:,.1f} MB of shards"
        f"{', found from before' if was_ready else ''}"
    )
    return manifest


def preprocess_partition(
    dataset: Path,
    base_model_uri: str,
    settings: PreprocessSettings,
    cache_uri: str,
    partition: int,
    num_partitions: int,
    num_workers: int = 0,
) -> str:
    """Write one pod's part of the shards into the cache, where `preprocess` finds them and adds the manifest.

    Args:
        dataset: folder written by validate_data.
        base_model_uri: checkpoint whose template, tokenizer and slicing apply.
        settings: the same for all parts.
        cache_uri: folder or URI that all pods reach.
        partition: number of this part, from 0.
        num_partitions: number of parts.
        num_workers: processes; 0 for as many as there are cores.

    Returns:
        The key of the shards, the same for all parts.
    """
    job = _job(dataset, base_model_uri, settings, cache_uri)
    tasks = job.work.tasks[partition::num_partitions]
    _write_missing(job, tasks, job.store.finished(tasks), num_workers)
    report_outcome(f"{len(tasks):,} of {len(job.work.tasks):,} shards, part {partition + 1} of {num_partitions}")
    return job.work.key


def markdown(manifest: Manifest) -> str:
    """The counts as a table."""
    rows = ""
    for split, lengths in manifest.lengths.items():
        counts = (len(lengths), manifest.slices[split], sum(lengths), max(lengths, default=0))
        rows += f"| {split} | {' | '.join(f'{count:,}' for count in counts)} |\n"
    return (
        f"MiniCPM-V {manifest.generation}, {manifest.bytes / 1e6:,.1f} MB of shards, images as {manifest.codec}\n\n"
        f"| Split | Samples | Slices | Tokens | Longest |\n|---|---:|---:|---:|---:|\n{rows}"
    )


def _job(dataset: Path, base_model_uri: str, settings: PreprocessSettings, cache_uri: str) -> _Job:
    info = read_info(dataset)
    base_model = storage.fetch(base_model_uri)
    encoder = Encoder.from_checkpoint(base_model, settings.max_slice_nums)
    work = plan_work(dataset, info, base_model, encoder, settings.model_max_length, settings.codec)
    tokenizer = hashlib.sha256((base_model / "tokenizer.json").read_bytes()).hexdigest()
    return _Job(dataset, info, encoder, settings, tokenizer, work, ShardStore(storage.join(cache_uri, work.key)))


def _write_missing(
    job: _Job, tasks: Sequence[ShardTask], found: Mapping[str, ShardRecord], num_workers: int
) -> dict[str, ShardRecord]:
    """Have processes write the shards that are not in the store yet; returns their records by name."""
    written: dict[str, ShardRecord] = {}
    missing = [task for task in tasks if task.name not in found]
    if not missing:
        return written
    images = any(task.images for task in tasks)
    counts = {task.name: task.images if images else task.rows for task in tasks}
    workers = min(num_workers or cores(), len(missing))
    done = CONTEXT.Value("q", 0)
    # What exists now stays shared: the collector of a process would else touch, and so copy, all of it.
    gc.freeze()
    with (
        progress("preprocess", sum(counts.values()), " images" if images else " samples") as bar,
        job.store.scratch() as scratch,
        worker_pool(workers, _start, (job, scratch, done, images)) as processes,
        # Twice as many shards are on their way as there are processes: one is uploaded while the next is written.
        ThreadPoolExecutor(2 * workers) as threads,
    ):
        bar.update(sum(counts[name] for name in found))
        before = bar.n
        processes.submit(os.getpid).result()  # starts all processes, before there are threads

        def write(task: ShardTask) -> ShardRecord:
            record = processes.submit(_write, task).result()
            job.store.put(scratch / record.shard.file, record)
            return record

        futures = {threads.submit(write, task): task for task in missing}
        try:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=1 / _LOOKS_A_SECOND)
                bar.update(before + done.value - bar.n)
                for future in finished:
                    written[futures[future].name] = future.result()
        except BrokenProcessPool as error:
            raise RetryableError(
                "A process of preprocess was killed, most likely for lack of memory; give the step more, or fewer "
                "num_workers."
            ) from error
        finally:
            for future in futures:
                future.cancel()
            processes.shutdown(cancel_futures=True)
            gc.unfreeze()
    return written


@dataclass
class _Process:
    """What a process needs for every shard."""

    job: _Job
    scratch: Path
    done: Any  # shared counter
    counts_images: bool


_process: _Process


def _start(job: _Job, scratch: Path, done: Any, counts_images: bool) -> None:
    global _process
    _process = _Process(job, scratch, done, counts_images)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if job.encoder.slicing.resampler == "torchvision":
        import torch

        torch.set_num_threads(1)  # the processes are what runs side by side


def _write(task: ShardTask) -> ShardRecord:
    lengths: list[int] = []
    slices: list[int] = []
    rejected: list[RejectedRow] = []

    def rows() -> Iterator[StoredRow]:
        job = _process.job
        for number, (sample, files) in enumerate(_read_ahead(samples_of(task, job.dataset))):
            try:
                encoded = tokenize(sample, job.encoder, job.settings.model_max_length)
                row = store(sample, encoded, [file.result() for file in files], job.encoder, job.settings.codec)
            except SampleError as error:
                rejected.append(RejectedRow(row=number, reason=error.reason, message=str(error)))
            else:
                lengths.append(len(encoded.input_ids))
                slices.append(count_slices(sample, job.encoder))
                yield row
            with _process.done.get_lock():
                _process.done.value += len(files) if _process.counts_images else 1

    shard = write_shard(_process.scratch / f"{task.name}.parquet", rows())
    return ShardRecord(shard=shard, lengths=lengths, slices=slices, rejected=rejected)


def _read_ahead(samples: Iterator[Sample]) -> Iterator[tuple[Sample, list["Future[bytes]"]]]:
    """Samples with their images' files, the next ones already being read."""
    with ThreadPoolExecutor(_READING_THREADS) as pool:

        def begun() -> Iterator[tuple[Sample, list[Future[bytes]]]]:
            for sample in samples:
                yield sample, [pool.submit(read_image, image) for image in sample.images]

        source = begun()
        window = deque(islice(source, _READ_AHEAD))
        while window:
            yield window.popleft()
            window.extend(islice(source, 1))


def _rejects(job: _Job, records: Mapping[str, ShardRecord]) -> Iterator[tuple[Split, Reject]]:
    """What was left out, with its place in the user's file as this dataset says it."""
    for task in job.work.tasks:
        reasons = {rejected.row: rejected for rejected in records[task.name].rejected}
        if not reasons:
            continue
        for number, sample in enumerate(samples_of(task, job.dataset)):
            if rejected := reasons.get(number):
                yield (
                    task.split,
                    Reject(
                        file=sample.source,
                        index=sample.index,
                        id=sample.id,
                        reason=rejected.reason,
                        message=rejected.message,
                    ),
                )


def _manifest(job: _Job, records: Mapping[str, ShardRecord]) -> Manifest:
    of_split = {split: [records[task.name] for task in job.work.tasks if task.split == split] for split in SPLITS}
    slicing = job.encoder.slicing
    return Manifest(
        generation=job.encoder.generation.version,
        tokenizer_sha256=job.tokenizer_sha256,
        max_slice_nums=slicing.max_slice_nums,
        model_max_length=job.settings.model_max_length,
        patch_size=slicing.patch_size,
        pad_token_id=job.encoder.pad_token_id,
        codec=job.settings.codec,
        slicing=slicing_fields(slicing),
        data_fingerprint=job.info.fingerprint,
        key=job.work.key,
        shards={split: [record.shard for record in group] for split, group in of_split.items()},
        lengths={split: [length for record in group for length in record.lengths] for split, group in of_split.items()},
        slices={split: sum(sum(record.slices) for record in group) for split, group in of_split.items()},
        bytes=sum(record.shard.bytes for record in records.values()),
    )


def check_parts(manifest: Manifest, keys: Sequence[str]) -> None:
    """Make sure that the parts were made for these shards and no others.

    Raises:
        UserError: another part was made with other settings, or of other data.
    """
    for key in keys:
        if key != manifest.key:
            raise UserError(
                f"A part was prepared under the key {key}, the whole has {manifest.key}; give preprocess and all of "
                "its parts the same data, base model and settings."
            )


def default_cache(dataset_uri: str, is_needed: bool = False) -> str:
    """Where a pipeline's runs keep their shards for each other: beside the folder of the run.

    Kubeflow puts an artifact below `<root>/<pipeline>/<run>/<task>/<execution>/`, kfp.local below
    `<root>/<run>/<task>/`; so it is `<root>/<pipeline>/shards-cache`, and `OUT/shards-cache` for a run here. The
    dataset's address decides, since it is the same for all parts of the work.

    Args:
        dataset_uri: of validate_data's artifact.
        is_needed: whether there is no doing without.

    Returns:
        A URI, or "" where this step has no access to the store.

    Raises:
        UserError: it has none, and needs it.
    """
    folder = dataset_uri
    for _ in range(4):
        above = storage.parent(folder)
        if above.endswith(":/"):  # a bucket is the outermost folder
            break
        folder = above
    cache = storage.join(folder, CACHE_NAME)
    try:
        storage.list_files(cache)
    except UserError as error:
        if is_needed:
            raise
        print(f"Shards are not kept for later runs: {error}", file=sys.stderr, flush=True)
        return ""
    return cache
