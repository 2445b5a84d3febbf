"""Read the user's data, check every sample, and write down what is wrong with the ones left out.

A sample is either accepted whole or rejected with a stable reason code and a sentence; none is repaired by guessing,
truncated or replaced by another. What an accepted sample means is decided here, once: which picture goes where in
which turn.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .. import storage
from ..errors import UserError
from ..progress import conclude, progress
from ..samples import (
    DATASET_FILE,
    DatasetInfo,
    Picture,
    Reject,
    Sample,
    SampleError,
    Split,
    Turn,
    content_digest,
    refuse_too_many,
    write_rejects,
)

_UNNAMED_MARK = "<image>"
_MARK = re.compile(r"<image>|<image_\d+>")


@dataclass(frozen=True)
class ValidationSettings:
    """What decides which samples pass and which become evaluation data.

    Attributes:
        max_reject_ratio: share of rejected samples above which the step fails.
        eval_fraction: share of pictures split off for evaluation when no evaluation data is given.
        seed: of that split.
    """

    max_reject_ratio: float = 0.05
    eval_fraction: float = 0.1
    seed: int = 42


class _RawTurn(BaseModel):
    """A turn as MiniCPM-V's published format writes it."""

    model_config = ConfigDict(strict=True)

    role: str
    content: str


class _RawSample(BaseModel):
    """A sample as MiniCPM-V's published format writes it; further fields are ignored."""

    model_config = ConfigDict(strict=True)

    id: Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)] = None
    image: str | dict[str, str] | None = None
    conversations: list[_RawTurn]
    metric: str | None = None
    tags: list[str] = []
    answers: list[str] = []


@dataclass(frozen=True)
class _Record:
    """One item of a data file: parsed JSON, or why it could not be parsed."""

    file: str
    index: int | None
    line: int | None
    content: Any
    problem: SampleError | None = None

    def rejected(self, error: SampleError, sample_id: str | None) -> Reject:
        return Reject(
            file=self.file, index=self.index, line=self.line, id=sample_id, reason=error.reason, message=str(error)
        )


def validate_data(
    data_uri: str, eval_data_uri: str, dataset: Path, rejects_file: Path, settings: ValidationSettings
) -> DatasetInfo:
    """Check the data and write the dataset folder that later steps rely on.

    Args:
        data_uri: JSON array or JSON Lines in MiniCPM-V's format; local or `s3://`.
        eval_data_uri: the same for evaluation; empty splits it off `data_uri`, by picture.
        dataset: folder that receives `train.jsonl`, `eval.jsonl` and, last, `dataset.json`.
        rejects_file: receives what was left out and why, also when the step fails over it.
        settings: see there.

    Returns:
        Counts and the content's fingerprint.

    Raises:
        UserError: nothing lies at a URI, nothing usable is left, or too much was rejected.
    """
    samples: dict[Split, list[Sample]] = {"train": [], "eval": []}
    rejects: list[Reject] = []
    sources: list[tuple[Split, str]] = [("train", data_uri)]
    if eval_data_uri:
        sources.append(("eval", eval_data_uri))
    for split, uri in sources:
        samples[split], rejected = _check_file(uri)
        rejects += rejected
        if not samples[split]:
            write_rejects(rejects_file, rejects)
            refuse_too_many(rejected, 0, settings.max_reject_ratio, rejects_file)
    write_rejects(rejects_file, rejects)
    accepted = len(samples["train"]) + len(samples["eval"])
    refuse_too_many(rejects, accepted, settings.max_reject_ratio, rejects_file)
    if not eval_data_uri:
        samples = _split_off(samples["train"], settings)
    info = DatasetInfo(
        fingerprint=_fingerprint(samples),
        rows={split: len(group) for split, group in samples.items()},
        rejected=dict(Counter(reject.reason for reject in rejects)),
    )
    with storage.staged_folder(dataset) as staging:
        for split, group in samples.items():
            (staging / f"{split}.jsonl").write_text("".join(f"{sample.model_dump_json()}\n" for sample in group))
        (staging / DATASET_FILE).write_text(info.model_dump_json(indent=1) + "\n")
    conclude(
        f"{info.rows['train']:,} samples to train on, {info.rows['eval']:,} to evaluate, {len(rejects):,} rejected"
    )
    return info


def markdown(info: DatasetInfo) -> str:
    """The counts as tables."""
    rows = "".join(f"| {split} | {count:,} |\n" for split, count in info.rows.items())
    text = f"| Split | Samples |\n|---|---:|\n{rows}"
    if info.rejected:
        reasons = "".join(f"| {reason} | {count:,} |\n" for reason, count in sorted(info.rejected.items()))
        text += f"\n| Rejected because of | Samples |\n|---|---:|\n{reasons}"
    return f"{text}\nFingerprint of the content: `{info.fingerprint}`\n"


def interpret(raw: _RawSample, pictures: list[Picture], source: str, default_id: str) -> Sample:
    """Decide which picture goes where, and refuse what is ambiguous.

    Args:
        raw: the sample as written.
        pictures: its pictures, in the order in which `image` lists them.
        source: place in the data, for messages.
        default_id: for a sample without one.

    Raises:
        SampleError: roles, placeholders or texts are not as the format wants them.
    """
    _check_roles(raw.conversations)
    marks = _number_marks(raw)
    turns = []
    for number, turn in enumerate(raw.conversations):
        parts = _split_at_marks(turn.content, marks)
        if turn.role != "user" and any(isinstance(part, int) for part in parts):
            raise SampleError(
                "placeholder_in_answer",
                f"turn {number} ({turn.role}) holds a picture's placeholder; move it into the user's words.",
            )
        turns.append(Turn(role=_role(turn.role), parts=tuple(parts)))
    if isinstance(raw.image, str) and not any(isinstance(part, int) for turn in turns for part in turn.parts):
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn(role="user", parts=(0, "\n", *turns[first].parts))
    for number, turn in enumerate(turns):
        if not turn.text and (turn.role == "assistant" or not any(isinstance(part, int) for part in turn.parts)):
            reason = "empty_answer" if turn.role == "assistant" else "empty_turn"
            raise SampleError(reason, f"turn {number} ({turn.role}) says nothing; give it words or leave it out.")
    return Sample(
        id=raw.id or default_id,
        pictures=tuple(pictures),
        turns=tuple(turns),
        source=source,
        metric=raw.metric,
        tags=tuple(raw.tags),
        answers=tuple(raw.answers),
    )


def inspect_picture(uri: str) -> Picture:
    """Read and decode a picture once, to know that training can.

    Raises:
        SampleError: it is missing, unreadable, or decompresses to more than Pillow's limit.
    """
    try:
        content = storage.read_bytes(uri)
    except UserError as error:
        reason = "image_refused" if uri.startswith(("http://", "https://")) else "image_missing"
        raise SampleError(reason, str(error)) from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise SampleError(
                    "decompression_bomb",
                    f"{uri}: {width} × {height} pixels are more than the {limit} allowed; scale it down.",
                )
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(
            "image_unreadable", f"{uri}: not a readable picture ({type(error).__name__}: {error}); replace it."
        ) from error
    return Picture(uri=uri, sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)


def _check_file(uri: str) -> tuple[list[Sample], list[Reject]]:
    """All samples of a file, in order, accepted or rejected."""
    records = list(_read_records(uri))
    inspected: dict[str, Picture | SampleError] = {}

    def check(record: _Record) -> Sample | Reject:
        content = record.content
        sample_id = str(content["id"]) if isinstance(content, dict) and "id" in content else None
        try:
            if record.problem:
                raise record.problem
            raw = _parse(content)
            pictures = []
            for reference in _references(raw):
                picture_uri = storage.resolve(reference, storage.parent(uri))
                if picture_uri not in inspected:
                    try:
                        inspected[picture_uri] = inspect_picture(picture_uri)
                    except SampleError as error:
                        inspected[picture_uri] = error
                found = inspected[picture_uri]
                if isinstance(found, SampleError):
                    raise found
                pictures.append(found)
            return interpret(raw, pictures, record.file, str(record.index))
        except SampleError as error:
            return record.rejected(error, sample_id)

    samples: list[Sample] = []
    rejects: list[Reject] = []
    with (
        progress("validate", len(records), " samples") as bar,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        for outcome in pool.map(check, records):
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                samples.append(outcome)
            bar.update()
    return samples, rejects


def _read_records(uri: str) -> Iterator[_Record]:
    """The items of a JSON array, of JSON Lines or of `{"data": […]}`."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON.") from error
    if not text.strip():
        yield _Record(uri, None, 1, None, SampleError("empty_file", "the file is empty; write samples into it."))
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            yield _Record(uri, None, error.lineno, None, _invalid_json(error.msg, error.lineno, error.colno))
            return
        yield from _read_lines(uri, text)
        return
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if isinstance(document, dict):
        document = [document]  # JSON Lines of one line
    if not isinstance(document, list):
        raise UserError(f"{uri}: holds {type(document).__name__}, not an array of samples; see docs/data-format.md.")
    if not document:
        yield _Record(uri, None, 1, None, SampleError("empty_file", "the array is empty; write samples into it."))
    for index, item in enumerate(document):
        yield _Record(uri, index, None, item)


def _read_lines(uri: str, text: str) -> Iterator[_Record]:
    index = 0
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            yield _Record(uri, index, line, json.loads(content))
        except json.JSONDecodeError as error:
            yield _Record(uri, index, line, None, _invalid_json(error.msg, line, error.colno))
        index += 1


def _invalid_json(message: str, line: int, column: int) -> SampleError:
    return SampleError("invalid_json", f"invalid JSON at line {line}, column {column}: {message}.")


def _parse(content: Any) -> _RawSample:
    try:
        return _RawSample.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the sample"
        raise SampleError("schema", f"{place}: {first['msg']}; see docs/data-format.md.") from error


def _references(raw: _RawSample) -> list[str]:
    if isinstance(raw.image, dict):
        return list(raw.image.values())
    return [raw.image] if raw.image else []


def _check_roles(turns: list[_RawTurn]) -> None:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        raise SampleError("roles", "the conversation has no turn; it needs a user's and an assistant's.")
    for number, turn in enumerate(spoken):
        expected = "user" if number % 2 == 0 else "assistant"
        if turn.role != expected:
            raise SampleError(
                "roles",
                f"turn {number + len(turns) - len(spoken)} has the role {turn.role!r} where {expected!r} is expected; "
                "user and assistant alternate, after at most one system turn.",
            )
    if spoken[-1].role != "assistant":
        raise SampleError("roles", "the last turn is the user's; training needs the assistant's answer to it.")


def _number_marks(raw: _RawSample) -> dict[str, int]:
    """Which placeholder stands for which picture, each used exactly once."""
    used = Counter(mark for turn in raw.conversations for mark in _MARK.findall(turn.content))
    if isinstance(raw.image, dict):
        marks = {name: number for number, name in enumerate(raw.image)}
        for name in marks:
            if not _MARK.fullmatch(name):
                raise SampleError(
                    "placeholder_name", f"{name!r} is no placeholder; name pictures <image_00>, <image_01>."
                )
            if name not in used:
                raise SampleError(
                    "placeholder_missing", f"no turn mentions {name}; write it where its picture belongs."
                )
    else:
        marks = {_UNNAMED_MARK: 0} if raw.image else {}
    for mark, count in used.items():
        if mark not in marks:
            raise SampleError("placeholder_without_image", f"the text says {mark}, but `image` names no such picture.")
        if count > 1:
            raise SampleError(
                "placeholder_doubled", f"{mark} stands {count} times in the text; a picture goes to one place."
            )
    return marks


def _split_at_marks(text: str, marks: dict[str, int]) -> list[str | int]:
    parts: list[str | int] = []
    end = 0
    for match in _MARK.finditer(text):
        parts += [text[end : match.start()], marks[match.group()]]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part != ""]


def _role(name: str) -> Literal["system", "user", "assistant"]:
    if name == "system":
        return "system"
    return "user" if name == "user" else "assistant"


def _split_off(samples: list[Sample], settings: ValidationSettings) -> dict[Split, list[Sample]]:
    """Split by a seeded hash of the picture, so that equal pictures stay together and added samples move none."""
    groups: dict[Split, list[Sample]] = {"train": [], "eval": []}
    for sample in samples:
        subject = min((picture.sha256 for picture in sample.pictures), default=content_digest(sample))
        draw = int.from_bytes(hashlib.sha256(f"{settings.seed}:{subject}".encode()).digest()[:8]) / 2**64
        groups["eval" if draw < settings.eval_fraction else "train"].append(sample)
    if not all(groups.values()):
        raise UserError(
            f"{len(samples)} samples are too few to split off {settings.eval_fraction:.0%} for evaluation; give "
            "evaluation data of its own."
        )
    return groups


def _fingerprint(samples: dict[Split, list[Sample]]) -> str:
    """A hash of content alone: the same data elsewhere, or in another order, has the same."""
    digest = hashlib.sha256()
    for split, group in samples.items():
        digest.update(split.encode())
        for content in sorted(content_digest(sample) for sample in group):
            digest.update(content.encode())
    return digest.hexdigest()
