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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
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
    refuse_nothing_left,
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
            refuse_nothing_left(rejected, split, rejects_file)
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
            lines = "".join(f"{sample.model_dump_json()}\n" for sample in group)
            (staging / f"{split}.jsonl").write_text(lines, encoding="utf-8")
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


def inspect_picture(uri: str) -> Picture:
    """Read and decode a picture once, to know that training can.

    Raises:
        SampleError: it is refused, missing, unreadable, or decompresses to more than Pillow's limit.
        RetryableError: the store does not answer.
    """
    try:
        content = storage.read_bytes(uri)
    except UserError as error:
        raise SampleError("image_missing" if storage.is_supported(uri) else "image_refused", str(error)) from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            too_large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
            if not too_large:
                image.load()
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:
        # Whatever a decoder raises over damaged bytes (struct.error, KeyError, …), it is about this picture.
        raise SampleError(
            "image_unreadable", f"{uri}: not a readable picture ({type(error).__name__}: {error}); replace it."
        ) from error
    if too_large:
        raise SampleError(
            "decompression_bomb", f"{uri}: more than the {Image.MAX_IMAGE_PIXELS:,} pixels allowed; scale it down."
        )
    return Picture(uri=uri, sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)


def _check_file(uri: str) -> tuple[list[Sample], list[Reject]]:
    """All samples of a file, in order, accepted or rejected."""
    records = list(_read_records(uri))
    inspect = lru_cache(maxsize=None)(_inspected)  # a picture that many samples show is decoded once
    samples: list[Sample] = []
    rejects: list[Reject] = []
    with (
        warnings.catch_warnings(),
        progress("validate", len(records), " samples") as bar,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong is told per sample
        for outcome in pool.map(lambda record: _check(record, inspect), records):
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                samples.append(outcome)
            bar.update()
    return samples, rejects


def _inspected(uri: str) -> Picture | SampleError:
    try:
        return inspect_picture(uri)
    except SampleError as error:
        return error


def _check(record: _Record, inspect: Callable[[str], Picture | SampleError]) -> Sample | Reject:
    try:
        if record.problem:
            raise record.problem
        raw = _parse(record.content)
        pictures = []
        for reference in _references(raw):
            found = inspect(storage.resolve(reference, storage.parent(record.file)))
            if isinstance(found, SampleError):
                raise found
            pictures.append(found)
        return _interpret(raw, pictures, record)
    except SampleError as error:
        content = record.content
        sample_id = str(content["id"]) if isinstance(content, dict) and "id" in content else None
        return Reject(
            file=record.file,
            index=record.index,
            line=record.line,
            id=sample_id and sample_id.encode(errors="replace").decode(),
            reason=error.reason,
            message=str(error),
        )


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
        if _is_one_document(text):
            yield _Record(uri, None, error.lineno, None, _invalid_json(error, error.lineno))
        else:
            yield from _read_lines(uri, text)
        return
    except (ValueError, RecursionError) as error:
        yield _Record(uri, None, 1, None, _invalid_json(error, 1))
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


def _is_one_document(text: str) -> bool:
    """Whether broken JSON was meant as a whole, not as a line for each sample.

    Then its first line is unfinished, and the next is no sample by itself.
    """
    first, _, rest = text.strip().partition("\n")
    if first.startswith("["):
        return True
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return error.pos == len(first.rstrip()) and not _is_object(rest.lstrip().partition("\n")[0])
    return False


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _read_lines(uri: str, text: str) -> Iterator[_Record]:
    index = 0
    # Not str.splitlines: it also splits at characters that JSON allows within a string, such as U+2028.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            yield _Record(uri, index, line, json.loads(content))
        except (ValueError, RecursionError) as error:
            yield _Record(uri, index, line, None, _invalid_json(error, line))
        index += 1


def _invalid_json(error: ValueError | RecursionError, line: int) -> SampleError:
    place, what = f"line {line}", str(error)
    if isinstance(error, json.JSONDecodeError):
        place, what = f"{place}, column {error.colno}", error.msg
    return SampleError("invalid_json", f"invalid JSON at {place} ({what}); correct it there.")


def _parse(content: Any) -> _RawSample:
    if isinstance(content, dict) and content.get("video"):
        raise SampleError(
            "video", "the field `video` asks for a video, which is not supported; give frames as pictures instead."
        )
    try:
        raw = _RawSample.model_validate(content)
        json.dumps(content, ensure_ascii=False).encode()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the sample"
        raise SampleError("schema", f"{place}: {first['msg']}; see docs/data-format.md.") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SampleError(
            "invalid_unicode", f"holds {half!r}, half of a surrogate pair, which is no character; correct the text."
        ) from error
    return raw


def _references(raw: _RawSample) -> list[str]:
    if isinstance(raw.image, dict):
        return list(raw.image.values())
    return [raw.image] if raw.image else []


def _interpret(raw: _RawSample, pictures: list[Picture], record: _Record) -> Sample:
    """Decide which picture goes where, and refuse what is ambiguous.

    Args:
        raw: the sample as written.
        pictures: its pictures, in the order in which `image` lists them.
        record: where it stands.
    """
    _check_roles(raw.conversations)
    marks = _number_marks(raw)
    texts = [turn.content for turn in raw.conversations]
    if isinstance(raw.image, str) and marks and not any(_MARK.search(text) for text in texts):
        first = 1 if raw.conversations[0].role == "system" else 0
        texts[first] = f"{_UNNAMED_MARK}\n{texts[first]}"
    turns = []
    for number, (raw_turn, text) in enumerate(zip(raw.conversations, texts, strict=True)):
        turn = Turn(role=_role(raw_turn.role), parts=tuple(_split_at_marks(text, marks)))
        has_picture = any(isinstance(part, int) for part in turn.parts)
        if has_picture and turn.role != "user":
            raise SampleError(
                "placeholder_in_answer",
                f"turn {number} ({turn.role}) holds a picture's placeholder; move it into the user's words.",
            )
        if not turn.text and not has_picture:
            reason = "empty_answer" if turn.role == "assistant" else "empty_turn"
            raise SampleError(reason, f"turn {number} ({turn.role}) says nothing; give it words or leave it out.")
        turns.append(turn)
    return Sample(
        id=str(record.index) if raw.id is None else raw.id,
        pictures=tuple(pictures),
        turns=tuple(turns),
        source=record.file,
        index=record.index,
        metric=raw.metric,
        tags=tuple(raw.tags),
        answers=tuple(raw.answers),
    )


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
