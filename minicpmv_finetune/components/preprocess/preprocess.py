"""Slice every image and tokenize every conversation once, so that no epoch does it again.

The data is cut into shards that do not depend on the process that writes them (`shard_tasks`). Each process writes one
shard at a time; a finished shard moves to the folder of its key (`finished_shards`) while the next one is written.
Shards that are already in that folder are not written again. So one mechanism resumes a killed attempt, shares the work
between pods, and reuses the shards of an earlier run. The manifest is written last.

The key needs the files of the base model, and not its tokenizer. What does need the tokenizer is in the folder of the
key too, so that a step that finds everything there does not import transformers, which takes as long as the rest. torch
and torchvision take five times as long; they are imported only if this step slices images by torchvision.
"""

import gc
import os
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from minicpmv_finetune import storage
from minicpmv_finetune.cores import cores
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
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import detect_generation, read_slicing_config
from minicpmv_finetune.minicpmv.slicing import SlicingConfig
from minicpmv_finetune.options import Accepted, check_settings
from minicpmv_finetune.outputs import check_cache, claimed_folder
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.shards.codecs import DEFAULT_CODEC, Codec
from minicpmv_finetune.shards.encoding import count_slices, store, tokenize
from minicpmv_finetune.shards.format import (
    CACHE_NAME,
    MANIFEST_FILE,
    SHARED_CACHE_NAME,
    Manifest,
    StoredRow,
    slicing_fields,
    write_shard,
)
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.step_runs import step_run
from minicpmv_finetune.workers import kill_workers, require_living_workers, shared_counter, worker_pool

from .finished_shards import FinishedShards
from .report import PREVIEWS_FILE, Preview, dump_previews, load_previews, preview_samples, write_report
from .shard_tasks import (
    SPLITS,
    DatasetShards,
    RejectedRow,
    ShardRecord,
    ShardTask,
    cut_into_shards,
    read_task_samples,
)

_READING_THREADS = 4
_READ_AT_ONCE = 4  # samples whose images a thread reads; for each one alone, waking threads takes a tenth of the time
_UPDATES_PER_SECOND = 5  # of the progress bar


@dataclass(frozen=True)
class PreprocessSettings:
    """The settings that determine the shards, beside the data and the base model.

    Attributes:
        max_slice_nums: Most slices of an image beside its overview; None for the base model's own number.
        model_max_length: Longest sample in tokens; a longer one is rejected, never cut.
        max_reject_ratio: Share of rejected samples above which the step fails.
        codec: Codec of the images.
    """

    max_slice_nums: Annotated[int | None, Accepted(at_least=1, at_most=1000)] = 9
    model_max_length: Annotated[int, Accepted(at_least=1, at_most=2**20)] = 2048
    max_reject_ratio: Annotated[float, Accepted(at_least=0, at_most=1)] = 0.05
    codec: Codec = DEFAULT_CODEC

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class _Job:
    """A dataset, the shards that it is cut into, and everything that is needed to write them."""

    dataset: Path
    info: DatasetInfo
    base_model: Path
    settings: PreprocessSettings
    slicing: SlicingConfig
    tokenizer_sha256: str
    shards: DatasetShards
    finished: FinishedShards

    @cached_property
    def encoder(self) -> Encoder:
        """The base model's encoder; the first use imports transformers."""
        return Encoder.from_checkpoint(self.base_model, self.settings.max_slice_nums)

    @property
    def needs_torch(self) -> bool:
        """Whether images are sliced in this step, and by torchvision."""
        return self.settings.codec != "source" and self.slicing.resampler == "torchvision"


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
    """Write the shards of a validated dataset, or reuse the shards of an earlier run.

    Args:
        dataset: Folder written by validate_data.
        base_model_uri: Checkpoint whose template, tokenizer and slicing are used.
        shards: Folder that receives the manifest, and the Parquet files if the cache is a local folder.
        rejects_file: File that receives each rejected sample with the reason, also when the step fails.
        settings: Settings that determine the shards.
        cache_uri: Folder or `s3://` URI where finished shards are kept for later runs; by default beside `shards`.
        num_workers: Number of processes; 0 for as many as there are cores.
        report: HTML file to write, or None.

    Returns:
        The manifest.

    Raises:
        UserError: The base model is unusable, an image changed, or too many samples were rejected.
        RetryableError: The store does not answer, or a process was killed.
    """
    inputs = {"--dataset": str(dataset), "--base-model": base_model_uri}
    beside = [rejects_file, *([report] if report else [])]
    check_cache(cache_uri, inputs)
    with claimed_folder(shards, "preprocess", inputs, beside) as output, step_run("preprocess") as run:
        run.log_parameters({"base_model": base_model_uri, **asdict(settings), "git_commit": git_commit()})
        job = _make_job(dataset, base_model_uri, settings, cache_uri or str(shards.absolute().parent / CACHE_NAME))
        run.log_parameters({"data_fingerprint": job.info.fingerprint, "shards_key": job.shards.key})
        found = job.finished.find(job.shards.tasks)
        all_found = len(found) == len(job.shards.tasks)
        found |= _write_missing(job, job.shards.tasks, found, num_workers)
        records = [found[task.name] for task in job.shards.tasks]
        earlier = job.finished.manifest() if all_found else None
        manifest = _manifest(job, found, earlier.pad_token_id if earlier else job.encoder.pad_token_id)
        rejects = _check_rejects(job, found, manifest, rejects_file)
        with output.assembled() as staging:
            location = job.finished.link_into(staging, records)
            manifest = manifest.model_copy(update={"location": location})
            content = f"{manifest.model_dump_json(indent=1)}\n"
            (staging / MANIFEST_FILE).write_text(content, encoding="utf-8")
        job.finished.write(MANIFEST_FILE, content.encode())
        run.log_metrics(_figures(manifest))
        if report:
            slices = np.concatenate([np.asarray(record.slices) for record in records])
            write_report(report, shards, _previews(job, shards), slices, rejects)
            run.log_report(report, "shards.html")
    tokens = sum(sum(lengths) for lengths in manifest.lengths.values())
    report_outcome(
        f"{sum(manifest.slices.values()):,} slices and {tokens:,} tokens in {manifest.bytes / 1e6:,.1f} MB of shards"
        f"{', reused from an earlier run' if all_found else ''}"
    )
    return manifest


def _figures(manifest: Manifest) -> dict[str, float]:
    """The counts by name, for MLflow."""
    figures: dict[str, float] = {"bytes": manifest.bytes}
    for split, lengths in manifest.lengths.items():
        figures |= {f"samples/{split}": len(lengths), f"tokens/{split}": sum(lengths)}
        figures[f"slices/{split}"] = manifest.slices[split]
    return figures


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
        dataset: Folder written by validate_data.
        base_model_uri: Checkpoint whose template, tokenizer and slicing are used.
        settings: Settings that determine the shards, the same for all parts.
        cache_uri: Folder or URI that all pods can read and write.
        partition: Number of this part, from 0.
        num_partitions: Number of parts.
        num_workers: Number of processes; 0 for as many as there are cores.

    Returns:
        The key of the shards, the same for all parts.
    """
    job = _make_job(dataset, base_model_uri, settings, cache_uri)
    tasks = job.shards.tasks[partition::num_partitions]
    _write_missing(job, tasks, job.finished.find(tasks), num_workers)
    report_outcome(f"{len(tasks):,} of {len(job.shards.tasks):,} shards, part {partition + 1} of {num_partitions}")
    return job.shards.key


def markdown(manifest: Manifest) -> str:
    """The counts of samples, slices and tokens as a Markdown table."""
    rows = ""
    for split, lengths in manifest.lengths.items():
        counts = (len(lengths), manifest.slices[split], sum(lengths), max(lengths, default=0))
        rows += f"| {split} | {' | '.join(f'{count:,}' for count in counts)} |\n"
    return (
        f"MiniCPM-V {manifest.generation}, {manifest.bytes / 1e6:,.1f} MB of shards, images as {manifest.codec}\n\n"
        f"| Split | Samples | Slices | Tokens | Longest |\n|---|---:|---:|---:|---:|\n{rows}"
    )


def _make_job(dataset: Path, base_model_uri: str, settings: PreprocessSettings, cache_uri: str) -> _Job:
    info = read_info(dataset)
    base_model = storage.fetch(base_model_uri)
    slicing = read_slicing_config(base_model).with_max_slices(settings.max_slice_nums)
    shards = cut_into_shards(dataset, info, base_model, slicing, settings.model_max_length, settings.codec)
    return _Job(
        dataset=dataset,
        info=info,
        base_model=base_model,
        settings=settings,
        slicing=slicing,
        tokenizer_sha256=storage.file_sha256(base_model / "tokenizer.json"),
        shards=shards,
        finished=FinishedShards(storage.join(cache_uri, shards.key)),
    )


def _write_missing(
    job: _Job, tasks: Sequence[ShardTask], found: Mapping[str, ShardRecord], num_workers: int
) -> dict[str, ShardRecord]:
    """Write the shards that are not finished yet, in several processes; returns their records by name."""
    written: dict[str, ShardRecord] = {}
    missing = [task for task in tasks if task.name not in found]
    if not missing:
        return written
    counts_images = any(task.images for task in tasks)
    counts = {task.name: task.images if counts_images else task.rows for task in tasks}
    workers = min(num_workers or cores(), len(missing))
    done = shared_counter()
    _ = job.encoder  # before the processes start, which share it
    if job.needs_torch:
        import torchvision.transforms.v2  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    # Otherwise the garbage collector of each process would write to, and so copy, the memory that the processes share.
    gc.freeze()
    with (
        progress("preprocess", sum(counts.values()), " images" if counts_images else " samples") as bar,
        job.finished.staging_folder() as staging,
        worker_pool(workers, _start_process, (job, staging, done, counts_images)) as processes,
        # Two threads for each process: one shard can be uploaded while the process writes the next one.
        ThreadPoolExecutor(2 * workers) as threads,
    ):
        bar.update(sum(counts[name] for name in found))
        before = bar.n
        processes.submit(os.getpid).result()  # starts all processes before this process has threads

        def write(task: ShardTask) -> ShardRecord:
            record = processes.submit(_write_shard, task).result()
            job.finished.add(staging / record.shard.file, record)
            return record

        futures = {threads.submit(write, task): task for task in missing}
        try:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=1 / _UPDATES_PER_SECOND)
                require_living_workers(processes)
                bar.update(before + done.value - bar.n)
                for future in finished:
                    written[futures[future].name] = future.result()
        except BaseException as error:
            # The threads wait for the processes.
            kill_workers(processes)
            if not isinstance(error, BrokenProcessPool):
                raise
            raise RetryableError(
                "A process of preprocess was killed, most likely for lack of memory; give the step more memory, or "
                "fewer num_workers."
            ) from error
        finally:
            for future in futures:
                future.cancel()
            gc.unfreeze()
    return written


@dataclass
class _Process:
    """The state of a worker process, the same for every shard."""

    job: _Job
    staging: Path
    done: Any  # counter that all processes share
    counts_images: bool


_process: _Process


def _start_process(job: _Job, staging: Path, done: Any, counts_images: bool) -> None:
    global _process
    _process = _Process(job, staging, done, counts_images)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if job.needs_torch:
        import torch

        torch.set_num_threads(1)  # the processes already use all cores


def _write_shard(task: ShardTask) -> ShardRecord:
    lengths: list[int] = []
    slices: list[int] = []
    rejected: list[RejectedRow] = []

    def rows() -> Iterator[StoredRow]:
        job = _process.job
        for number, (sample, files) in enumerate(_read_ahead(read_task_samples(task, job.dataset))):
            try:
                encoded = tokenize(sample, job.encoder, job.settings.model_max_length)
                row = store(sample, encoded, files, job.encoder, job.settings.codec)
            except SampleError as error:
                rejected.append(RejectedRow(row=number, reason=error.reason, message=str(error)))
            else:
                lengths.append(len(encoded.input_ids))
                slices.append(count_slices(sample, job.encoder))
                yield row
            with _process.done.get_lock():
                _process.done.value += len(files) if _process.counts_images else 1

    shard = write_shard(_process.staging / f"{task.name}.parquet", rows())
    return ShardRecord(shard=shard, lengths=lengths, slices=slices, rejected=rejected)


def _read_ahead(samples: Iterator[Sample]) -> Iterator[tuple[Sample, list[bytes]]]:
    """Each sample with the files of its images; threads read those of the next samples, a few samples at a time.

    An image that cannot be read ends the step, also where its sample would be rejected.
    """

    def read(group: list[Sample]) -> list[tuple[Sample, list[bytes]]]:
        return [(sample, [read_image(image) for image in sample.images]) for sample in group]

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        source = (pool.submit(read, group) for group in iter(lambda: list(islice(samples, _READ_AT_ONCE)), []))
        window = deque(islice(source, _READING_THREADS))
        while window:
            yield from window.popleft().result()
            window.extend(islice(source, 1))


def _check_rejects(job: _Job, records: Mapping[str, ShardRecord], manifest: Manifest, rejects_file: Path) -> RejectLog:
    """Write the list of the rejected samples, and return it.

    Raises:
        UserError: A split has no sample left, or too many samples were rejected.
    """
    with RejectLog(rejects_file) as rejects:
        for split, reject in _list_rejects(job, records):
            rejects.append(reject, split)
        for split in SPLITS:
            if job.info.rows.get(split) and not manifest.rows(split):
                rejects.refuse_nothing_left(split)
        rejects.refuse_too_many(sum(manifest.rows(split) for split in SPLITS), job.settings.max_reject_ratio)
    return rejects


def _list_rejects(job: _Job, records: Mapping[str, ShardRecord]) -> Iterator[tuple[Split, Reject]]:
    """The rejected samples, with their position in the user's file as this dataset states it."""
    for task in job.shards.tasks:
        reasons = {rejected.row: rejected for rejected in records[task.name].rejected}
        if not reasons:
            continue
        for number, sample in enumerate(read_task_samples(task, job.dataset)):
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


def _previews(job: _Job, shards: Path) -> tuple[Preview, ...]:
    """What the model sees of some samples, made by the first run that writes a report."""
    if (kept := load_previews(job.finished.read(PREVIEWS_FILE))) is not None:
        return kept
    previews = preview_samples(shards, job.encoder)
    job.finished.write(PREVIEWS_FILE, dump_previews(previews))
    return previews


def _manifest(job: _Job, records: Mapping[str, ShardRecord], pad_token_id: int) -> Manifest:
    of_split = {split: [records[task.name] for task in job.shards.tasks if task.split == split] for split in SPLITS}
    return Manifest(
        generation=detect_generation(job.base_model).version,
        tokenizer_sha256=job.tokenizer_sha256,
        max_slice_nums=job.slicing.max_slice_nums,
        model_max_length=job.settings.model_max_length,
        patch_size=job.slicing.patch_size,
        pad_token_id=pad_token_id,
        codec=job.settings.codec,
        slicing=slicing_fields(job.slicing),
        data_fingerprint=job.info.fingerprint,
        key=job.shards.key,
        shards={split: [record.shard for record in group] for split, group in of_split.items()},
        lengths={
            split: array("i", chain.from_iterable(record.lengths for record in group))
            for split, group in of_split.items()
        },
        slices={split: sum(sum(record.slices) for record in group) for split, group in of_split.items()},
        bytes=sum(record.shard.bytes for record in records.values()),
    )


def check_parts(manifest: Manifest, keys: Sequence[str]) -> None:
    """Make sure that all parts were prepared for the shards of the manifest.

    Args:
        manifest: Manifest of the whole.
        keys: Key that each part returned.

    Raises:
        UserError: A part was prepared with other settings or from other data.
    """
    for key in keys:
        if key != manifest.key:
            raise UserError(
                f"A part was prepared under the key {key}, but the whole has {manifest.key}; give preprocess and all "
                "of its parts the same data, base model and settings."
            )


def default_cache(dataset_uri: str, is_needed: bool = False) -> str:
    """The folder where runs keep their shards for later runs of any pipeline, beside the folders of the runs.

    Kubeflow stores an artifact below `<root>/<pipeline>/<run>/<task>/<execution>/`, and kfp.local below
    `<root>/<run>/<task>/`. So the folder is `<root>/minicpmv-shards`, and `OUT/shards-cache` for a local run. It is
    derived from the dataset's address, which is the same for all parts of a run.

    Args:
        dataset_uri: URI of validate_data's artifact.
        is_needed: Whether the step cannot work without the folder.

    Returns:
        The URI, or "" if this step has no access to the store.

    Raises:
        UserError: The step needs the folder and has no access to the store.
    """
    folder, is_object = dataset_uri, storage.is_object_uri(dataset_uri)
    for _ in range(5 if is_object else 4):
        above = storage.parent(folder)
        if above.endswith(":/"):  # a bucket is the outermost folder
            break
        folder = above
    cache = storage.join(folder, SHARED_CACHE_NAME if is_object else CACHE_NAME)
    try:
        storage.list_files(cache)
    except UserError as error:
        if is_needed:
            raise
        print_sentence(f"Shards are not kept for later runs: {error}")
        return ""
    return cache
