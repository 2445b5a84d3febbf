"""Checks of one sample: what it means, or why it cannot be used.

A sample is either accepted whole or rejected with a stable reason code and a sentence; none is repaired by guessing,
truncated or replaced by another. This module is the only place that decides which image goes where in which turn.
Every image is decoded, because only decoding shows whether an image is readable.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from PIL import Image, ImageOps
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from . import image_files
from .other_formats import find_ignored_fields, kind_of
from .reading import Record
from .samples import ImageRef, Reject, Sample, SampleError, Turn, content_digest

MINIATURE_SIDE = 16  # pixels
_UNNAMED_PLACEHOLDER = "<image>"
_PLACEHOLDER = re.compile(r"<image>|<image_\d+>")
_OTHER_MARK = re.compile(r"<(video|audio)>(?!.*</\1>)", re.DOTALL)  # of other formats; with an end tag it is HTML
_CACHED_IMAGES = 4096
_REMOTE_READS = 16  # parallel reads of each process: a store answers many requests in the time of one


class _RawTurn(BaseModel):
    """A turn as MiniCPM-V's published format writes it."""

    model_config = ConfigDict(strict=True)

    role: str
    content: str
    loss: bool | None = None


class _RawSample(BaseModel):
    """A sample as MiniCPM-V's published format writes it; further fields are ignored."""

    model_config = ConfigDict(strict=True)

    id: Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)] = None
    image: Annotated[str | dict[str, str] | None, BeforeValidator(lambda value: _single_image(value))] = None
    conversations: list[_RawTurn]
    metric: str | None = None
    tags: list[str] | None = None
    answers: list[str] | None = None


@dataclass(frozen=True)
class InspectedImage:
    """An image that can be used.

    Attributes:
        ref: Address, hash and size of the image.
        miniature: The image in 16 × 16 RGB pixels, row by row, by which copies of it are found.
        notes: Codes of the image's noteworthy properties.
    """

    ref: ImageRef
    miniature: bytes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AcceptedSample:
    """A sample that later steps can rely on, ready to be written.

    Attributes:
        line: The `Sample` as JSON.
        digest: Hash of the sample's content, 32 bytes.
        turns: Number of turns.
        images: The inspected images of the sample.
        notes: Codes of noteworthy properties of the sample or its images.
        ignored: Names of its fields that have no meaning.
    """

    line: str
    digest: bytes
    turns: int
    images: tuple[InspectedImage, ...]
    notes: frozenset[str]
    ignored: tuple[str, ...] = ()


# The byte range of each archive member by its address, or why the archive cannot be listed.
MemberSpans = Mapping[str, image_files.Span | SampleError]


def check_records(records: Sequence[Record], spans: MemberSpans, exif_transpose: bool) -> list[AcceptedSample | Reject]:
    """Check some items of a data file, in order.

    Args:
        records: The items.
        spans: The byte ranges of the archive members that the items name.
        exif_transpose: Whether images are rotated as their EXIF orientation says.

    Raises:
        RetryableError: The store does not answer.
    """

    def inspect(address: str) -> InspectedImage | SampleError:
        span = spans.get(address)
        if isinstance(span, SampleError):
            return span
        # An image that many samples show is decoded once; a data: URI is used by one sample only.
        inspect_once = _inspect_cached.__wrapped__ if image_files.is_data_uri(address) else _inspect_cached
        return inspect_once(address, span, exif_transpose)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # each sample's reject reports its problems instead
        if any(storage.is_object_uri(address) for record in records for address in image_addresses(record)):
            with ThreadPoolExecutor(_REMOTE_READS) as pool:
                return list(pool.map(lambda record: check_record(record, inspect), records))
        return [check_record(record, inspect) for record in records]


def clear_image_cache() -> None:
    """Forget all inspected images, because their files may have changed."""
    _inspect_cached.cache_clear()


def image_addresses(record: Record) -> list[str]:
    """The addresses of the images that an item names, as far as the item can be parsed."""
    image = _single_image(record.content.get("image")) if isinstance(record.content, dict) else None
    references = image.values() if isinstance(image, dict) else [image]
    found = []
    for reference in references:
        try:
            if reference and isinstance(reference, str):
                found.append(image_files.resolve(reference, storage.parent(record.file)))
        except UserError:
            pass  # reported by `check_record`
    return found


def inspect_image(address: str, span: image_files.Span | None = None, exif_transpose: bool = False) -> InspectedImage:
    """Read and decode an image once, to make sure that training can.

    Args:
        address: An address as `image_files.resolve` returns it.
        span: The byte range in the archive, for a member of one.
        exif_transpose: Whether to rotate the image as its EXIF orientation says.

    Raises:
        SampleError: The image is refused, missing, unreadable, animated, of 16 bits, or larger than Pillow's limit.
        RetryableError: The store does not answer.
    """
    try:
        content = image_files.read(address, span)
    except UserError as error:
        raise SampleError(_read_failure_reason(address), str(error)) from error
    try:
        image = image_files.open_header(content)
        problem = image_problem(image, address)
        # An image that is too deep is decoded all the same: if its bytes are damaged, that is the reason to give.
        if problem is None or problem.reason == "image_depth":
            image.load()  # in front of has_exif_rotation, for which Pillow would decode a PNG itself
            has_rotation = image_files.has_exif_rotation(image)
            notes = _notes(image, has_rotation)
            image = ImageOps.exif_transpose(image) if exif_transpose and has_rotation else image
            miniature = _miniature(image)
    except Image.DecompressionBombError:
        problem = _too_large(address)
    except Exception as error:
        # Decoders raise many kinds of error for damaged bytes (struct.error, KeyError, …); all are about this image.
        raise SampleError(
            "image_unreadable",
            f"{image_files.shortened(address)}: {image_files.explain_unreadable(content, error)}",
        ) from error
    if problem:
        raise problem
    ref = ImageRef(
        uri=address,
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.width,
        height=image.height,
        span=span,
        rotated=exif_transpose and has_rotation,
    )
    return InspectedImage(ref, miniature, notes)


def image_problem(image: Image.Image, address: str) -> SampleError | None:
    """Why an image cannot be used although its header is readable, or None; no pixel is decoded.

    Args:
        image: The image, opened by `image_files.open_header`.
        address: The image's address, for the message.
    """
    name = image_files.shortened(address)
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        return _too_large(address)
    # Several cameras store MPO files: a JPEG, followed by a second view of the same scene.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return SampleError(
            "image_animated", f"{name}: has several frames, of which only one would be used; store that one."
        )
    if image.mode.startswith("I") or image.mode == "F":
        return SampleError(
            "image_depth", f"{name}: has gray levels of more than 8 bits, which would be cut to white; scale them."
        )
    return None


def _too_large(address: str) -> SampleError:
    return SampleError(
        "decompression_bomb",
        f"{image_files.shortened(address)}: more than the {Image.MAX_IMAGE_PIXELS:,} pixels allowed; scale it down.",
    )


def _miniature(image: Image.Image) -> bytes:
    rgb = image_files.to_rgb(image, "white")
    return rgb.resize((MINIATURE_SIDE, MINIATURE_SIDE), Image.Resampling.BOX).tobytes()


def _notes(image: Image.Image, has_rotation: bool) -> tuple[str, ...]:
    noted = {
        "exif_rotated": has_rotation,
        "cmyk": image.mode == "CMYK",
        "palette": image.mode in ("P", "PA"),
        "transparent": "A" in image.getbands() or "transparency" in image.info,
    }
    return tuple(code for code, applies in noted.items() if applies)


@lru_cache(maxsize=_CACHED_IMAGES)
def _inspect_cached(address: str, span: image_files.Span | None, exif_transpose: bool) -> InspectedImage | SampleError:
    try:
        return inspect_image(address, span, exif_transpose)
    except SampleError as error:
        return error


def check_record(record: Record, inspect: Callable[[str], InspectedImage | SampleError]) -> AcceptedSample | Reject:
    """Check one item of a data file.

    Args:
        record: The item.
        inspect: Inspects the image at an address, or returns why it cannot be used.
    """
    try:
        if record.problem:
            raise record.problem
        raw = _parse(record.content)
        ignored = find_ignored_fields(record.content)
        images = []
        for reference in _references(raw):
            image = inspect(_resolve(reference, record))
            if isinstance(image, SampleError):
                raise image
            images.append(image)
        sample, notes = _interpret(raw, [image.ref for image in images], record)
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
    return AcceptedSample(
        line=sample.model_dump_json(exclude_defaults=True),
        digest=bytes.fromhex(content_digest(sample)),
        turns=len(sample.turns),
        images=tuple(images),
        notes=notes.union(*(image.notes for image in images)),
        ignored=tuple(ignored),
    )


def _resolve(reference: str, record: Record) -> str:
    try:
        return image_files.resolve(reference, storage.parent(record.file))
    except UserError as error:
        raise SampleError("image_refused", str(error)) from error


def _read_failure_reason(address: str) -> str:
    if image_files.is_data_uri(address):
        return "image_unreadable"
    return "image_missing" if storage.is_supported(address) else "image_refused"


def _parse(content: Any) -> _RawSample:
    if isinstance(content, dict) and content.get("video"):
        raise SampleError(
            "video", "the field `video` names a video, which is not supported; give frames as images instead."
        )
    if not isinstance(content, dict):
        raise SampleError("schema", f"the sample is {kind_of(content)}, not an object; see docs/data-format.md.")
    try:
        json.dumps(content, ensure_ascii=False).encode()
        raw = _RawSample.model_validate(content)
    except ValidationError as error:
        find_ignored_fields(content)  # raises if the sample has another program's format
        raise SampleError("schema", f"{_describe_problem(error)}; see docs/data-format.md.") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SampleError(
            "invalid_unicode",
            f"contains {half!r}, half of a surrogate pair, which is not a character; correct the text.",
        ) from error
    return raw


def _describe_problem(error: ValidationError) -> str:
    """The first field that has another type than it should have, and what it is."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "dict[str,str]"))
    if first["type"] == "missing":
        return f"{place}: Field required"
    wanted = {"string": "text", "list": "an array", "bool": "true or false", "model": "an object"}
    kind = "an image, or an object with an image for each placeholder"
    if first["loc"] != ("image", "str"):
        kind = wanted[first["type"].partition("_")[0]]
    return f"{place}: should be {kind}, not {kind_of(first['input'])}"


def _single_image(value: Any) -> Any:
    """The image of a list that contains one; anything else is unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _references(raw: _RawSample) -> list[str]:
    if isinstance(raw.image, dict):
        return list(raw.image.values())
    return [raw.image] if raw.image else []


def _interpret(raw: _RawSample, images: list[ImageRef], record: Record) -> tuple[Sample, frozenset[str]]:
    """Decide which image goes where, and refuse what is ambiguous.

    Args:
        raw: The sample as written in the data file.
        images: The sample's images, in the order in which the field `image` lists them.
        record: The item of the data file that contains the sample.

    Returns:
        The sample, and the codes of its noteworthy properties.
    """
    _check_roles(raw.conversations)
    placeholders = _number_placeholders(raw)
    texts = [turn.content for turn in raw.conversations]
    if isinstance(raw.image, str) and placeholders and not any(_PLACEHOLDER.search(text) for text in texts):
        first = 1 if raw.conversations[0].role == "system" else 0
        texts[first] = f"{_UNNAMED_PLACEHOLDER}\n{texts[first]}"
    turns = [
        _turn(number, raw_turn, text, placeholders)
        for number, (raw_turn, text) in enumerate(zip(raw.conversations, texts, strict=True))
    ]
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not any(turn.loss for turn in answers):
        raise SampleError("nothing_supervised", "every answer has loss false, so that nothing is trained; remove it.")
    sample = Sample(
        id=str(record.index) if raw.id is None else raw.id,
        images=tuple(images),
        turns=tuple(turns),
        source=record.file,
        index=record.index,
        metric=raw.metric,
        tags=tuple(raw.tags or ()),
        answers=tuple(raw.answers or ()),
    )
    order = [part for turn in turns for part in turn.parts if isinstance(part, int)]
    noted = {
        "order_by_text": order != sorted(order),
        "untrained_answer": not all(turn.loss for turn in answers),
        "early_reasoning": any(turn.loss and turn.text.startswith("<think>") for turn in answers[:-1]),
    }
    return sample, frozenset(code for code, applies in noted.items() if applies)


def _turn(number: int, raw: _RawTurn, text: str, placeholders: dict[str, int]) -> Turn:
    role = _role(raw.role)
    if raw.loss and role != "assistant":
        raise SampleError("schema", f"turn {number} ({role}) has loss true, but only answers are trained; remove it.")
    if role != "assistant" and (mark := _OTHER_MARK.search(text)):
        raise SampleError(
            "video" if mark[1] == "video" else "unsupported",
            f"turn {number} ({role}) marks {mark[0]}, which is not supported; give frames of a video as images, and "
            "write what is said as text.",
        )
    parts = tuple(_split_at_placeholders(text, placeholders))
    turn = Turn(role=role, parts=parts, loss=raw.loss is not False or role != "assistant")
    has_image = any(isinstance(part, int) for part in turn.parts)
    if has_image and turn.role != "user":
        raise SampleError(
            "placeholder_in_answer",
            f"turn {number} ({turn.role}) contains an image's placeholder; move it into the user's text.",
        )
    if not turn.text and not has_image:
        reason = "empty_answer" if turn.role == "assistant" else "empty_turn"
        raise SampleError(reason, f"turn {number} ({turn.role}) has no text; give it one or remove the turn.")
    return turn


def _check_roles(turns: list[_RawTurn]) -> None:
    if sum(turn.role == "system" for turn in turns) > 1:
        raise SampleError("two_system_turns", "there is more than one system turn; join them into the first.")
    dialog = turns[1:] if turns and turns[0].role == "system" else turns
    if not dialog:
        raise SampleError("roles", "the conversation has no turn; it needs a user's and an assistant's.")
    for number, turn in enumerate(dialog):
        expected = "user" if number % 2 == 0 else "assistant"
        if turn.role != expected:
            raise SampleError(
                "roles",
                f"turn {number + len(turns) - len(dialog)} has the role {turn.role!r:.60} where {expected!r} is "
                "expected; user and assistant alternate, after at most one system turn.",
            )
    if dialog[-1].role != "assistant":
        raise SampleError("roles", "the last turn is the user's; training needs the assistant's answer to it.")


def _number_placeholders(raw: _RawSample) -> dict[str, int]:
    """The number of the image that each placeholder stands for; each placeholder is used exactly once."""
    used = Counter(name for turn in raw.conversations for name in _PLACEHOLDER.findall(turn.content))
    if isinstance(raw.image, dict):
        placeholders = {name: number for number, name in enumerate(raw.image)}
        for name in placeholders:
            if not _PLACEHOLDER.fullmatch(name):
                raise SampleError(
                    "placeholder_name", f"{name!r} is no placeholder; name images <image_00>, <image_01>."
                )
            if name not in used:
                raise SampleError("placeholder_missing", f"no turn mentions {name}; write it where its image belongs.")
    else:
        placeholders = {_UNNAMED_PLACEHOLDER: 0} if raw.image else {}
    for name, count in used.items():
        if name not in placeholders:
            raise SampleError(
                "placeholder_without_image",
                f"the text contains {name}, but `image` names no such image; add the image or remove the placeholder.",
            )
        if count > 1:
            raise SampleError(
                "placeholder_doubled",
                f"{name} occurs {count} times in the text, but an image goes to one place; keep one.",
            )
    return placeholders


def _split_at_placeholders(text: str, placeholders: dict[str, int]) -> list[str | int]:
    parts: list[str | int] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        parts += [text[end : match.start()], placeholders[match.group()]]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part != ""]


def _role(name: str) -> Literal["system", "user", "assistant"]:
    if name == "system":
        return "system"
    return "user" if name == "user" else "assistant"
