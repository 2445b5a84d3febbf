"""Data of other programs in this project's format: LLaVA, OpenAI's chat messages, and folders of Hugging Face datasets.

All three are conversations that name images, in a list beside the turns or within them, so one conversion serves
them: images are named `<image_00>`, `<image_01>`, … in the order in which the turns show them. It judges nothing that
validate-data judges; what cannot be converted at all, such as a video, is listed with its reason. Images that
stand in a dataset's own files go to one tar shard beside the output.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import progress, report_outcome

from . import image_files
from .reading import read_records
from .samples import Reject, RejectLog, SampleError

_TABLES = (".parquet", ".arrow")
_BATCH = 16  # rows of a table that are in memory at once
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system", "model": "assistant"}
_QUESTIONS = ("question", "query", "prompt", "instruction")
_ANSWERS = ("answer", "answers", "response", "output")
_MARK = "<image>"


@dataclass
class _Shard:
    """The tar file that receives images, made when the first one comes; equal ones are stored once."""

    path: Path
    names: set[str] = field(default_factory=set)
    archive: tarfile.TarFile | None = None

    def add(self, content: bytes, suffix: str) -> str:
        """The reference of an image."""
        if self.archive is None:
            self.archive = tarfile.open(self.path.with_name(f".{self.path.name}.{os.getpid()}"), "w")  # noqa: SIM115
        name = f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
        if name not in self.names:
            self.names.add(name)
            header = tarfile.TarInfo(name)
            header.size = len(content)
            self.archive.addfile(header, io.BytesIO(content))
        return f"{self.path.name}!{name}"

    def close(self, keep: bool) -> None:
        """Give the file its name, or remove it."""
        if self.archive is not None:
            self.archive.close()
            staging = Path(os.fsdecode(self.archive.name or ""))
            if keep:
                staging.replace(self.path)
            else:
                staging.unlink()


def import_data(source: str, out: Path, image_folder: str = "") -> None:
    """Write data of another format as JSON Lines for validate-data.

    Args:
        source: a JSON array or JSON Lines (LLaVA's, or OpenAI's messages), a folder that `datasets` saved or that
            holds Parquet files, or a pattern of files; local or `s3://`.
        out: file that receives the samples; rejects and images lie beside it.
        image_folder: what images' paths are relative to; empty for the folder of the source.

    Raises:
        UserError: nothing lies there, it is of no known format, or nothing of it can be used.
    """
    imported = 0
    shard = _Shard(out.with_name(f"{out.stem}.pictures.tar"))
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    with RejectLog(out.with_name(f"{out.stem}.rejects.jsonl")) as rejects, ExitStack() as undone:
        undone.callback(shard.close, keep=False)
        undone.callback(staging.unlink, missing_ok=True)
        with staging.open("w", encoding="utf-8") as lines:
            for file, index, item, problem in _items(source):
                try:
                    if problem:
                        raise problem
                    folder = image_folder or storage.parent(file)
                    sample = _converted(item, partial(_reference, folder=folder, out=out, shard=shard))
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
                    lines.write(f"{json.dumps(sample, ensure_ascii=True)}\n")
                    imported += 1
        if not imported:
            rejects.refuse_nothing_left("train")
        undone.pop_all()
        shard.close(keep=True)
        staging.replace(out)
    refused = rejects.counts.total()
    listed = f", {refused:,} refused, listed in {rejects.path}" if refused else ""
    report_outcome(f"{imported:,} samples in {out}{listed}")


def _items(source: str) -> Iterator[tuple[str, int | None, Any, SampleError | None]]:
    """File, index and content of each item, or why it has none."""
    tables = _tables(source)
    if tables:
        yield from _rows(tables)
        return
    for uri in storage.expand(source):
        path = _fetched(uri)
        with progress("import", path.stat().st_size, "B", unit_scale=True) as bar:
            for record in read_records(uri, path, bar.update):
                if record.is_last:
                    raise UserError(f"{uri}, line {record.line}: {record.problem}")
                yield uri, record.index, record.content, record.problem


def _fetched(uri: str) -> Path:
    if storage.is_object_uri(uri):
        return storage.fetch(uri)
    with storage.open_stream(uri):  # or say why not
        return Path(uri).expanduser()


def _tables(source: str) -> list[Path]:
    """The Parquet or Arrow files of a folder or pattern; none if the source is something else."""
    if source.endswith(_TABLES):
        return [_fetched(uri) for uri in storage.expand(source)]
    if source.endswith((".json", ".jsonl")):
        return []
    path = storage.fetch(source) if storage.is_object_uri(source) else Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            raise UserError(
                f"{source}: holds the splits {', '.join(splits)}; give one of them, such as "
                f"{storage.join(source, splits[0])}."
            )
        found = sorted(file for file in path.rglob("*") if file.suffix in _TABLES and file.is_file())
        if not found:
            raise UserError(f"{source}: a folder without Parquet or Arrow files; give one of those, or a JSON file.")
        splits = sorted({file.name.split("-")[0] for file in found if "-" in file.name} - {"data"})
        if len(splits) > 1:
            example = found[0].with_name(f"{splits[0]}-*{found[0].suffix}")
            raise UserError(f"{source}: holds the splits {', '.join(splits)}; give one of them, such as '{example}'.")
        return found
    return []


def _rows(tables: list[Path]) -> Iterator[tuple[str, int | None, Any, SampleError | None]]:
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
                    schema, batches = stream.schema, (part for batch in stream for part in _parts(batch))
                videos = _video_columns(schema)
                for batch in batches:
                    for row in batch.to_pylist():
                        item = {("video" if name in videos else name): value for name, value in row.items()}
                        yield str(path), index, item, None
                        index += 1
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{path}: not a readable table ({error}); save it again.") from error
            bar.update()


def _parts(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _video_columns(schema: Any) -> set[str]:
    """What `datasets` has noted of its columns, which for a video is stored as an image is."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return {name for name, feature in features.items() if "'Video'" in str(feature)}


def _converted(item: Any, refer: Callable[[Any], str]) -> dict[str, Any]:
    """A sample of this project's format.

    Args:
        item: of another format.
        refer: gives the reference of an image.

    Raises:
        SampleError: it cannot be converted.
    """
    if not isinstance(item, dict):
        raise SampleError("schema", f"holds {type(item).__name__}, not an object; see docs/data-format.md.")
    if video := item.get("video") or item.get("videos"):
        name = video if isinstance(video, str) else "one"
        raise SampleError("video", f"asks for a video ({name:.100}), which is not supported; give frames as images.")
    listed = item.get("image") or item.get("images") or []
    waiting = list(listed) if isinstance(listed, list) else [listed]
    shown: dict[str, str] = {}

    def place(image: Any) -> str:
        mark = f"<image_{len(shown):02}>"
        shown[mark] = refer(image)
        return mark

    turns = []
    for speaker, content in _turns(item):
        text = _text(content, waiting, place)
        turns.append({"role": _ROLES.get(speaker, speaker), "content": text})
    if waiting and shown:
        raise SampleError("placeholder_missing", f"the turns show {len(shown)} of its images and not the others.")
    if waiting:
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise SampleError("roles", "no turn is the user's, to which its images would belong.")
        first["content"] = "\n".join([*map(place, waiting), first["content"]])
    answers = item.get("answers")
    return {
        **({"id": item["id"]} if isinstance(item.get("id"), str | int) else {}),
        **({"image": shown} if shown else {}),
        "conversations": turns,
        **({"answers": answers} if isinstance(answers, list) and all(isinstance(a, str) for a in answers) else {}),
    }


def _turns(item: dict[str, Any]) -> list[tuple[str, Any]]:
    """Who says what."""
    turns = item.get("messages") or item.get("conversations") or item.get("conversation")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        said = [
            (turn.get("role") or turn.get("from"), turn["content"] if "content" in turn else turn.get("value"))
            for turn in turns
        ]
        if all(isinstance(speaker, str) for speaker, _ in said):
            return said
    question = next((item[name] for name in _QUESTIONS if isinstance(item.get(name), str)), None)
    answer = next((item[name] for name in _ANSWERS if item.get(name)), None)
    if isinstance(answer, list):
        answer = answer[0]
    if question is None or not isinstance(answer, str):
        raise SampleError(
            "schema",
            f"of its fields {', '.join(map(str, item))[:200]} none are messages, conversations, or a question with an "
            "answer; rename them.",
        )
    return [("user", question), ("assistant", answer)]


def _text(content: Any, waiting: list[Any], place: Callable[[Any], str]) -> str:
    """What a turn says, with its images' marks."""
    if isinstance(content, str):
        before, *rest = content.split(_MARK)
        for words in rest:
            before += (place(waiting.pop(0)) if waiting else _MARK) + words
        return before
    if not isinstance(content, list):
        raise SampleError("schema", f"a turn's content is {type(content).__name__}, not text; see docs/data-format.md.")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind in ("text", "input_text", "output_text"):
            said = part.get("text") if isinstance(part, dict) else part
            if not isinstance(said, str):
                raise SampleError("schema", f"a turn holds {type(said).__name__} where a text belongs; correct it.")
            parts.append(said)
        elif kind in ("image_url", "input_image") or (kind == "image" and not waiting):
            image = part.get("image_url") or part.get("image")
            parts.append(place(image["url"] if isinstance(image, dict) and "url" in image else image))
        elif kind == "image":
            parts.append(place(waiting.pop(0)))
        elif "video" in str(kind):
            raise SampleError("video", "a turn shows a video, which is not supported; give frames as images.")
        else:
            raise SampleError("schema", f"a turn holds {kind!r}, which is neither text nor an image; leave it out.")
    # As the published code joins what a turn consists of.
    return "\n".join(parts)


def _reference(image: Any, folder: str, out: Path, shard: _Shard) -> str:
    """How the written file names an image."""
    if isinstance(image, dict):  # of `datasets`: its bytes, or a path
        name = image.get("path") or ""
        if image.get("bytes"):
            return shard.add(image["bytes"], PurePosixPath(name).suffix.lower())
        image = name
    if not isinstance(image, str) or not image:
        raise SampleError("schema", f"an image is {type(image).__name__}, not a path or data: URI.")
    if image.startswith("file://"):
        image = unquote(urlsplit(image).path)
    try:
        address = image_files.resolve(image, folder)
    except UserError as error:
        raise SampleError("image_refused", str(error)) from error
    if address[:5].lower() == "data:":
        return address
    if not storage.is_supported(address):
        raise SampleError(
            "image_refused",
            f"{image_files.shown(address)}: only local paths, s3:// and data: URIs are supported; copy it.",
        )
    here = out.absolute().parent
    inside = not storage.is_object_uri(address) and Path(address).is_relative_to(here)
    return str(Path(address).relative_to(here)) if inside else address
