"""What one sample means, or why it cannot be used.

A sample is either accepted whole or rejected with a stable reason code and a sentence; none is repaired by guessing,
truncated or replaced by another. What an accepted sample means is decided here, once: which image goes where in
which turn. Every image is decoded, because only that tells whether it can be.
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

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.data.image_files import to_rgb
from minicpmv_finetune.errors import UserError, describe_validation_error

from . import image_files
from .reading import Record
from .samples import ImageRef, Reject, Sample, SampleError, Turn, content_digest

GRAY_SIDE = 16  # pixels
_UNNAMED_MARK = "<image>"
_MARK = re.compile(r"<image>|<image_\d+>")
_CACHED_IMAGES = 4096
_REMOTE_READS = 16  # at once, by each process: a store answers many requests in the time of one


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
class Look:
    """An image that can be decoded.

    Attributes:
        image: its address and size.
        gray: 16 × 16 grey levels, row by row, by which copies of it are found.
        notes: codes of what is worth knowing of it.
    """

    image: ImageRef
    gray: bytes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Accepted:
    """A sample that later steps can rely on, ready to be written.

    Attributes:
        line: the `Sample` as JSON.
        digest: of its content, 32 bytes.
        turns: number of turns.
        looks: of its images.
        notes: codes of what is worth knowing of it or its images.
    """

    line: str
    digest: bytes
    turns: int
    looks: tuple[Look, ...]
    notes: frozenset[str]


# Of the members of shards: their places, or why there is none.
Places = Mapping[str, image_files.Span | SampleError]


def check_all(records: Sequence[Record], places: Places, exif_transpose: bool) -> list[Accepted | Reject]:
    """Check some items of a file, in order.

    Args:
        records: the items.
        places: where the members of shards lie that they name, by address.
        exif_transpose: whether images are turned as their EXIF orientation says.

    Raises:
        RetryableError: the store does not answer.
    """

    def inspect(address: str) -> Look | SampleError:
        place = places.get(address)
        if isinstance(place, SampleError):
            return place
        # An image that many samples show is decoded once; one that stands in its sample is shown by that alone.
        cached = _inspected.__wrapped__ if address[:5].lower() == "data:" else _inspected
        return cached(address, place, exif_transpose)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong is told per sample
        if any(storage.is_object_uri(address) for record in records for address in addresses(record)):
            with ThreadPoolExecutor(_REMOTE_READS) as pool:
                return list(pool.map(lambda record: check(record, inspect), records))
        return [check(record, inspect) for record in records]


def forget_images() -> None:
    """Look at every image anew, as it may have changed since the last time."""
    _inspected.cache_clear()


def addresses(record: Record) -> list[str]:
    """The images that an item names, as far as it can be read."""
    image = record.content.get("image") if isinstance(record.content, dict) else None
    references = image.values() if isinstance(image, dict) else [image]
    found = []
    for reference in references:
        try:
            if reference and isinstance(reference, str):
                found.append(image_files.resolve(reference, storage.parent(record.file)))
        except UserError:
            pass  # told when the item is checked
    return found


def inspect_image(address: str, span: image_files.Span | None = None, exif_transpose: bool = False) -> Look:
    """Read and decode an image once, to know that training can.

    Args:
        address: as `image_files.resolve` gives it.
        span: for a member of a shard, its place there.
        exif_transpose: whether to turn it as its EXIF orientation says.

    Raises:
        SampleError: it is refused, missing, unreadable, animated, of 16 bits, or larger than Pillow's limit.
        RetryableError: the store does not answer.
    """
    shown = image_files.shown(address)
    try:
        content = image_files.read(address, span)
    except UserError as error:
        raise SampleError(_why_unread(address), str(error)) from error
    try:
        image = image_files.open_header(content)
        width, height = image.size
        too_large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
        # What several cameras store as MPO is a JPEG with a second view behind it.
        frames = getattr(image, "is_animated", False) and image.format != "MPO"
        if not too_large and not frames:
            is_turned = image_files.is_turned(image)
            notes = _notes(image, is_turned)
            mode = image.mode
            image = image_files.decode(content, turn=exif_transpose and is_turned)
            gray = to_rgb(image, "white").convert("L").resize((GRAY_SIDE, GRAY_SIDE), Image.Resampling.BOX).tobytes()
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:
        # Whatever a decoder raises over damaged bytes (struct.error, KeyError, …), it is about this image.
        raise SampleError(
            "image_unreadable", f"{shown}: not a readable image ({type(error).__name__}: {error}); replace it."
        ) from error
    if too_large:
        raise SampleError(
            "decompression_bomb", f"{shown}: more than the {Image.MAX_IMAGE_PIXELS:,} pixels allowed; scale it down."
        )
    if frames:
        raise SampleError(
            "image_animated", f"{shown}: holds several frames, of which only one would be seen; store that one."
        )
    if mode.startswith("I") or mode == "F":
        raise SampleError(
            "image_depth", f"{shown}: has grey levels of more than 8 bits, which would be cut to white; scale them."
        )
    image_ref = ImageRef(
        uri=address,
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.width,
        height=image.height,
        span=span,
        turned=exif_transpose and is_turned,
    )
    return Look(image_ref, gray, notes)


def _notes(image: Image.Image, is_turned: bool) -> tuple[str, ...]:
    noted = {
        "exif_rotated": is_turned,
        "cmyk": image.mode == "CMYK",
        "palette": image.mode in ("P", "PA"),
        "transparent": "A" in image.getbands() or "transparency" in image.info,
    }
    return tuple(code for code, applies in noted.items() if applies)


@lru_cache(maxsize=_CACHED_IMAGES)
def _inspected(address: str, span: image_files.Span | None, exif_transpose: bool) -> Look | SampleError:
    try:
        return inspect_image(address, span, exif_transpose)
    except SampleError as error:
        return error


def check(record: Record, inspect: Callable[[str], Look | SampleError]) -> Accepted | Reject:
    """Check an item of a file.

    Args:
        record: the item.
        inspect: what looks at an image, given its address.
    """
    try:
        if record.problem:
            raise record.problem
        raw = _parse(record.content)
        looks = []
        for reference in _references(raw):
            look = inspect(_resolve(reference, record))
            if isinstance(look, SampleError):
                raise look
            looks.append(look)
        sample, notes = _interpret(raw, [look.image for look in looks], record)
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
    return Accepted(
        line=sample.model_dump_json(exclude_defaults=True),
        digest=bytes.fromhex(content_digest(sample)),
        turns=len(sample.turns),
        looks=tuple(looks),
        notes=notes.union(*(look.notes for look in looks)),
    )


def _resolve(reference: str, record: Record) -> str:
    try:
        return image_files.resolve(reference, storage.parent(record.file))
    except UserError as error:
        raise SampleError("image_refused", str(error)) from error


def _why_unread(address: str) -> str:
    if address[:5].lower() == "data:":
        return "image_unreadable"
    return "image_missing" if storage.is_supported(address) else "image_refused"


def _parse(content: Any) -> _RawSample:
    if isinstance(content, dict) and content.get("video"):
        raise SampleError(
            "video", "the field `video` asks for a video, which is not supported; give frames as images instead."
        )
    try:
        raw = _RawSample.model_validate(content)
        json.dumps(content, ensure_ascii=False).encode()
    except ValidationError as error:
        raise SampleError(
            "schema", f"{describe_validation_error(error, 'the sample')}; see docs/data-format.md."
        ) from error
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


def _interpret(raw: _RawSample, shown: list[ImageRef], record: Record) -> tuple[Sample, frozenset[str]]:
    """Decide which image goes where, and refuse what is ambiguous.

    Args:
        raw: the sample as written.
        shown: its images, in the order in which `image` lists them.
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
        has_image = any(isinstance(part, int) for part in turn.parts)
        if has_image and turn.role != "user":
            raise SampleError(
                "placeholder_in_answer",
                f"turn {number} ({turn.role}) holds an image's placeholder; move it into the user's words.",
            )
        if not turn.text and not has_image:
            reason = "empty_answer" if turn.role == "assistant" else "empty_turn"
            raise SampleError(reason, f"turn {number} ({turn.role}) says nothing; give it words or leave it out.")
        turns.append(turn)
    sample = Sample(
        id=str(record.index) if raw.id is None else raw.id,
        images=tuple(shown),
        turns=tuple(turns),
        source=record.file,
        index=record.index,
        metric=raw.metric,
        tags=tuple(raw.tags),
        answers=tuple(raw.answers),
    )
    order = [part for turn in turns for part in turn.parts if isinstance(part, int)]
    return sample, frozenset({"order_by_text"} if order != sorted(order) else ())


def _check_roles(turns: list[_RawTurn]) -> None:
    if sum(turn.role == "system" for turn in turns) > 1:
        raise SampleError("two_system_turns", "there is more than one system turn; join them into the first.")
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
    """Which placeholder stands for which image, each used exactly once."""
    used = Counter(mark for turn in raw.conversations for mark in _MARK.findall(turn.content))
    if isinstance(raw.image, dict):
        marks = {name: number for number, name in enumerate(raw.image)}
        for name in marks:
            if not _MARK.fullmatch(name):
                raise SampleError(
                    "placeholder_name", f"{name!r} is no placeholder; name images <image_00>, <image_01>."
                )
            if name not in used:
                raise SampleError("placeholder_missing", f"no turn mentions {name}; write it where its image belongs.")
    else:
        marks = {_UNNAMED_MARK: 0} if raw.image else {}
    for mark, count in used.items():
        if mark not in marks:
            raise SampleError("placeholder_without_image", f"the text says {mark}, but `image` names no such image.")
        if count > 1:
            raise SampleError(
                "placeholder_doubled", f"{mark} stands {count} times in the text; an image goes to one place."
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
