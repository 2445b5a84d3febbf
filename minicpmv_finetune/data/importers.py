"""Convert data files of other programs, and folders of Hugging Face datasets.

`other_formats` converts a sample. Those that cannot be converted, such as videos, are listed with the reason. Images
that are stored in a dataset's own files are written to one tar archive beside the output.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import check_file, claimed_files
from minicpmv_finetune.progress import progress, report_outcome
from minicpmv_finetune.terminal import print_sentence

from . import image_files
from .other_formats import convert, describe_ignored, kind_of
from .reading import local_copy, read_records, require_source
from .samples import Reject, RejectLog, SampleError

_TABLES = (".parquet", ".arrow")
_BATCH = 16  # rows of a table in memory at once


@dataclass
class _ImageArchive:
    """The tar file that receives images, created for the first one; equal images are stored once."""

    path: Path
    names: set[str] = field(default_factory=set)
    file: tarfile.TarFile | None = None

    def add(self, content: bytes, suffix: str) -> str:
        """Store an image and return its reference."""
        if self.file is None:
            self.file = tarfile.open(self.path.with_name(f".{self.path.name}.{os.getpid()}"), "w")  # noqa: SIM115
        name = f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
        if name not in self.names:
            self.names.add(name)
            header = tarfile.TarInfo(name)
            header.size = len(content)
            self.file.addfile(header, io.BytesIO(content))
        return f"{self.path.name}!{name}"

    def close(self, keep: bool) -> None:
        """Give the file its final name, or remove it."""
        if self.file is not None:
            self.file.close()
            staging = Path(os.fsdecode(self.file.name or ""))
            if keep:
                staging.replace(self.path)
            else:
                staging.unlink()


def import_data(source: str, out: Path, image_folder: str = "") -> dict[str, int]:
    """Write data of another format as JSON Lines for validate-data.

    Args:
        source: A JSON array or JSON Lines (LLaVA's, or OpenAI's messages), a folder that `datasets` saved or that
            contains Parquet files, or a pattern of files; local or `s3://`.
        out: File that receives the samples; rejects and images are written beside it.
        image_folder: Folder that relative image paths start at; empty for the folder of the source.

    Returns:
        Number of `samples`, and of `rejected` items.

    Raises:
        UserError: There is no file at the source, its format is unknown, or no item of it can be used.
    """
    check_file(out, "import-data")
    if not storage.is_folder(source):
        require_source(source)
    out = out.expanduser().resolve()  # through a link, to the file that it names
    rejects_file = out.with_name(f"{out.stem}.rejects.jsonl")
    files = [out, rejects_file, out.with_name(f"{out.stem}.pictures.tar")]
    with claimed_files(files, "import-data", {"SOURCE": source}):
        return _import(source, out, rejects_file, image_folder)


def _import(source: str, out: Path, rejects_file: Path, image_folder: str) -> dict[str, int]:
    imported = 0
    ignored: Counter[str] = Counter()
    archive = _ImageArchive(out.with_name(f"{out.stem}.pictures.tar"))
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    with RejectLog(rejects_file) as rejects, ExitStack() as cleanup:
        cleanup.callback(archive.close, keep=False)
        cleanup.callback(staging.unlink, missing_ok=True)
        with staging.open("w", encoding="utf-8") as lines:
            for file, index, item, problem in _read_items(source):
                try:
                    if problem:
                        raise problem
                    folder = image_folder or storage.parent(file)
                    sample = convert(item, partial(_reference_of, folder=folder, out=out, archive=archive))
                except SampleError as error:
                    name = item.get("id") if isinstance(item, dict) else None
                    rejects.append(
                        Reject(
                            file=file,
                            index=index,
                            id=None if name is None else str(name),
                            reason=error.reason,
                            message=str(error),
                        ),
                        "train",
                    )
                else:
                    lines.write(f"{json.dumps(sample.content, ensure_ascii=True)}\n")
                    ignored.update(sample.ignored)
                    imported += 1
        if not imported:
            rejects.refuse_nothing_left("train")
        cleanup.pop_all()
        archive.close(keep=True)
        staging.replace(out)
    if ignored:
        print_sentence(f"note: {describe_ignored(ignored)}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejects.counts.most_common())
    listed = f", {rejects.counts.total():,} rejected ({reasons}), listed in {rejects.path}" if reasons else ""
    report_outcome(f"{imported:,} samples in {out}{listed}")
    return {"samples": imported, "rejected": rejects.counts.total()}


def _read_items(source: str) -> Iterator[tuple[str, int | None, Any, SampleError | None]]:
    """File, index and content of each item, or the reason why the item could not be read."""
    tables = _find_tables(source)
    if tables:
        yield from _read_tables(tables)
        return
    for uri in storage.expand(source):
        path = local_copy(uri)
        with progress("import", path.stat().st_size, "B", unit_scale=True) as bar:
            for record in read_records(uri, path, bar.update):
                if record.is_last:
                    raise UserError(f"{uri}, line {record.line}: {record.problem}")
                yield uri, record.index, record.content, record.problem


def _find_tables(source: str) -> list[Path]:
    """The Parquet or Arrow files of a folder or pattern; none if the source is something else."""
    if source.endswith(_TABLES):
        return [local_copy(uri) for uri in storage.expand(source)]
    if source.endswith((".json", ".jsonl")) or not storage.is_folder(source):
        return []
    files = sorted(storage.walk(source))
    if "dataset_dict.json" in files:
        splits = json.loads(storage.read_bytes(storage.join(source, "dataset_dict.json")))["splits"]
        raise UserError(
            f"{source}: contains the splits {', '.join(splits)}; give one of them, such as "
            f"{storage.join(source, splits[0])}."
        )
    found = [PurePosixPath(file) for file in files if file.endswith(_TABLES)]
    if not found:
        raise UserError(f"{source}: a folder without Parquet or Arrow files; give a folder with some, or a JSON file.")
    splits = sorted({file.name.split("-")[0] for file in found if "-" in file.name} - {"data"})
    if len(splits) > 1:
        example = found[0].with_name(f"{splits[0]}-*{found[0].suffix}")
        raise UserError(
            f"{source}: contains the splits {', '.join(splits)}; give one of them, such as "
            f"'{storage.join(source, str(example))}'."
        )
    return [local_copy(storage.join(source, str(file))) for file in found]


def _read_tables(tables: list[Path]) -> Iterator[tuple[str, int | None, Any, SampleError | None]]:
    import pyarrow as pa
    from pyarrow import parquet

    with progress("import", len(tables), " files") as bar:
        for path in tables:
            index = 0
            try:
                if path.suffix == ".parquet":
                    file = parquet.ParquetFile(path)
                    schema, batches = file.schema_arrow, file.iter_batches(batch_size=_BATCH)
                else:
                    stream = pa.ipc.open_stream(pa.memory_map(str(path)))
                    schema, batches = stream.schema, (part for batch in stream for part in _split_batch(batch))
                doubled = [name for name, count in Counter(schema.names).items() if count > 1]
                if doubled:
                    raise UserError(f"{path}: has the column {doubled[0]!r} more than once; keep one.")
                videos = _video_columns(schema)
                for batch in batches:
                    for row in batch.to_pylist():
                        item = {("video" if name in videos else name): value for name, value in row.items()}
                        yield str(path), index, item, None
                        index += 1
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{path}: not a readable table ({error}); save it again.") from error
            bar.update()


def _split_batch(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _video_columns(schema: Any) -> set[str]:
    """The columns of videos: videos and images are stored alike, only the metadata of `datasets` tells them apart."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    return {name for name, feature in features.items() if "'Video'" in str(feature)}


def _reference_of(image: Any, folder: str, out: Path, archive: _ImageArchive) -> str:
    """The name of an image in the written file."""
    if isinstance(image, dict):  # from `datasets`: bytes, or a path
        name = image.get("path") or image.get("url") or ""
        if image.get("bytes"):
            return archive.add(image["bytes"], PurePosixPath(name).suffix.lower())
        image = name
    if not isinstance(image, str) or not image:
        raise SampleError("schema", f"an image is {kind_of(image)}, not a path or data: URI; correct it.")
    if image.startswith("file://"):
        image = unquote(urlsplit(image).path)
    try:
        address = image_files.resolve(image, folder)
    except UserError as error:
        raise SampleError("image_refused", str(error)) from error
    if image_files.is_data_uri(address):
        return address
    if not storage.is_supported(address):
        raise SampleError(
            "image_refused",
            f"{image_files.shortened(address)}: only local paths, s3:// and data: URIs are supported; copy the image.",
        )
    here = out.absolute().parent
    inside = not storage.is_object_uri(address) and Path(address).is_relative_to(here)
    return str(Path(address).relative_to(here)) if inside else address
