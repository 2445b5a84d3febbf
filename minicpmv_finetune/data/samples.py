"""The data contract between steps: what an accepted sample looks like, on disk and in memory.

A dataset folder holds `train.jsonl`, `eval.jsonl` and `dataset.json`. Each line is a `Sample`
whose turns are lists of parts: a string is text, an integer is the number of one of the sample's images. So
"where does image 2 go" is answered once, by validate_data, and no later step parses placeholders. Images stay
where they are; their sha256 makes a change under a run an error instead of a surprise.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from . import image_files

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"
_EXAMPLES = 3  # rejects of a reason that are kept at hand
Split = Literal["train", "eval"]
Document = TypeVar("Document", bound=BaseModel)


class ImageRef(BaseModel):
    """One image of a sample, as its header describes it."""

    model_config = ConfigDict(frozen=True)

    uri: str
    sha256: str = Field(description="of the file's bytes")
    width: int
    height: int
    span: tuple[int, int] | None = Field(default=None, description="first byte and number of bytes in a tar shard")
    turned: bool = Field(default=False, description="to be turned as its EXIF orientation says; the size is after that")


class Turn(BaseModel):
    """One message: text parts are strings, an integer part stands for the image of that number."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | int, ...]

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()


class Sample(BaseModel):
    """A conversation about zero or more images that every later step can rely on."""

    # `pictures` is what files have called it since 0.1.0.
    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    id: str
    images: tuple[ImageRef, ...] = Field(alias="pictures")
    turns: tuple[Turn, ...]
    source: str = Field(description="file it came from, for error messages")
    index: int | None = Field(default=None, description="position among that file's samples, from 0")
    metric: str | None = Field(default=None, description="scores this sample in evaluation, whatever the set's metric")
    tags: tuple[str, ...] = Field(default=(), description="groups by which evaluation is broken down")
    answers: tuple[str, ...] = Field(default=(), description="accepted answers; empty means the last turn alone")


class Reject(BaseModel):
    """Why a sample is not used."""

    model_config = ConfigDict(frozen=True)

    file: str
    index: int | None = Field(default=None, description="position among the file's samples, from 0")
    line: int | None = Field(default=None, description="line of the file, from 1, where it could not be parsed")
    id: str | None
    reason: str = Field(description="stable code, for counting")
    message: str = Field(description="one sentence for a person")

    @property
    def place(self) -> str:
        """Where it was found."""
        return f"{self.file}, {f'line {self.line}' if self.index is None else f'sample {self.index}'}"


class DatasetInfo(BaseModel):
    """`dataset.json`: written last, so a dataset without it does not exist."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    fingerprint: str = Field(description="sha256 over the accepted samples' content, whatever their address")
    rows: dict[Split, int]
    rejected: dict[str, int] = Field(description="number of rejected samples by reason")
    noted: dict[str, int] = Field(default={}, description="what is worth knowing of accepted samples, by code")
    exif_transpose: bool = Field(default=False, description="whether images are turned as EXIF says; serving must too")


class SampleError(Exception):
    """A sample that cannot be used; the step that finds it turns it into a `Reject`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # all arguments, so that it travels between processes
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


def read_info(dataset: Path) -> DatasetInfo:
    """The description of a finished dataset folder.

    Raises:
        UserError: the folder is no finished dataset, or of a newer schema.
    """
    return read_versioned(dataset / DATASET_FILE, DatasetInfo, SCHEMA_VERSION, made_by="validate-data")


def read_versioned(path: Path, model: type[Document], newest: int, made_by: str) -> Document:
    """The document that is a step's commit point.

    Args:
        path: where it should lie.
        model: what it holds; has a `schema_version`, 1 where a file says none.
        newest: the newest schema version this program knows.
        made_by: the command that writes it.

    Raises:
        UserError: there is none, it is damaged, or of a newer schema.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} here, so {made_by} has not finished; run it first.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.get("schema_version", 1)
        if version <= newest:
            return model.model_validate(document)
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(repr(error).split())
        raise UserError(f"{path}: damaged or of another program ({reason:.200}); run {made_by} again.") from error
    raise UserError(
        f"{path}: schema version {version} is newer than this program's {newest}; upgrade minicpmv-finetune."
    )


def read_samples(dataset: Path, split: Split) -> Iterator[Sample]:
    """The accepted samples of one split, in their order."""
    with (dataset / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield Sample.model_validate_json(line)


def read_image(image: ImageRef) -> bytes:
    """An image's bytes, still encoded.

    Raises:
        UserError: they are not those that were validated.
    """
    content = image_files.read(image.uri, image.span)
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise UserError(f"{image_files.shown(image.uri)}: changed since it was validated; run validate-data again.")
    return content


def decode_image(content: bytes, turned: bool = False) -> Image.Image:
    """Decode an image's bytes, unconverted; `turned` is what its `ImageRef` says."""
    return image_files.decode(content, turned)


def open_image(image: ImageRef) -> Image.Image:
    """Decode an image, unconverted.

    Raises:
        UserError: its bytes are not those that were validated.
    """
    return decode_image(read_image(image), image.turned)


def content_digest(sample: Sample) -> str:
    """A hash of what the sample says, shows and asks for, independent of ids, addresses and image sizes."""
    content: dict[str, Any] = {
        "pictures": [image.sha256 for image in sample.images],
        "turns": [[turn.role, *turn.parts] for turn in sample.turns],
        "evaluation": [sample.metric, sample.tags, sample.answers],
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write `rejects.jsonl`, one JSON object a line."""
    storage.write_bytes(str(path), "".join(f"{reject.model_dump_json()}\n" for reject in rejects).encode())


class RejectLog:
    """Writes `rejects.jsonl` as rejects come, so that memory does not grow with their number.

    Leaving the block gives the file its name, also when it is left by an error: then the list is needed most.

    Attributes:
        counts: number of rejects by reason.
        examples: the first few of each reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Reject]] = {}
        self._firsts: dict[Split, Reject] = {}
        self._splits: Counter[Split] = Counter()

    def __enter__(self) -> Self:
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            staging.parent.mkdir(parents=True, exist_ok=True)
            self._file = staging.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another folder.") from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        Path(self._file.name).replace(self.path)

    def append(self, reject: Reject, split: Split) -> None:
        """Write one."""
        self._file.write(f"{reject.model_dump_json()}\n")
        self.counts[reject.reason] += 1
        self._splits[split] += 1
        self._firsts.setdefault(split, reject)
        examples = self.examples.setdefault(reject.reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(reject)

    def refuse_nothing_left(self, split: Split) -> NoReturn:
        """End the step because every sample of a split was rejected.

        Raises:
            UserError: always, with the first reject as an example and the place of the whole list.
        """
        _refuse_nothing_left(self._firsts.get(split), self._splits[split], split, self.path)

    def refuse_too_many(self, accepted: int, max_reject_ratio: float) -> None:
        """End the step when too much was rejected.

        Raises:
            UserError: with the first reject as an example and the place of the whole list.
        """
        _refuse_too_many(
            next(iter(self._firsts.values()), None), self.counts.total(), accepted, max_reject_ratio, self.path
        )


def refuse_nothing_left(rejects: Sequence[Reject], split: Split, listed_in: Path) -> None:
    """End the step because every sample of a split was rejected.

    Raises:
        UserError: always, with the first reject as an example and the place of the whole list.
    """
    _refuse_nothing_left(rejects[0] if rejects else None, len(rejects), split, listed_in)


def refuse_too_many(rejects: Sequence[Reject], accepted: int, max_reject_ratio: float, listed_in: Path) -> None:
    """End the step when too much was rejected.

    Raises:
        UserError: with the first reject as an example and the place of the whole list.
    """
    _refuse_too_many(rejects[0] if rejects else None, len(rejects), accepted, max_reject_ratio, listed_in)


def _refuse_nothing_left(first: Reject | None, rejected: int, split: Split, listed_in: Path) -> NoReturn:
    example = f"; the first is {first.place}: {first.message}" if first else "."
    raise UserError(f"{listed_in}: no usable {split} sample is left, {rejected} were rejected{example}")


def _refuse_too_many(
    first: Reject | None, rejected: int, accepted: int, max_reject_ratio: float, listed_in: Path
) -> None:
    total = accepted + rejected
    if first and rejected > max_reject_ratio * total:
        raise UserError(
            f"{listed_in}: {rejected} of {total} samples ({rejected / total:.1%}) were rejected, more than "
            f"max_reject_ratio {max_reject_ratio:.1%} allows; mend them or raise it; the first is {first.place}: "
            f"{first.message}"
        )
