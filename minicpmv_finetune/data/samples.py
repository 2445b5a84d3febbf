"""The data contract between steps: the format of accepted samples, on disk and in memory.

A dataset folder contains `train.jsonl`, `eval.jsonl` and `dataset.json`. Each line is a `Sample` whose turns are lists
of parts: a string is text, an integer is the number of one of the sample's images. So only validate_data decides where
each image goes, and no later step parses placeholders. Images stay where they are; their sha256 makes a change
during a run an error instead of a silent difference.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from . import image_files

SCHEMA_VERSION = 2  # 2: turns may have `loss`, which 0.1.0 would ignore
DATASET_FILE = "dataset.json"
_EXAMPLES = 100  # rejects of each reason that are kept in memory, for the report
Split = Literal["train", "eval"]
Document = TypeVar("Document", bound=BaseModel)


class ImageRef(BaseModel):
    """One image of a sample, as its header describes it."""

    # Files since 0.1.0 have the key `turned`.
    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    uri: str
    sha256: str = Field(description="Hash of the file's bytes.")
    width: int = Field(description="Width in pixels, after rotation.")
    height: int = Field(description="Height in pixels, after rotation.")
    span: tuple[int, int] | None = Field(default=None, description="First byte and number of bytes in a tar archive.")
    rotated: bool = Field(
        default=False, alias="turned", description="Whether to rotate the image as its EXIF orientation says."
    )


class Turn(BaseModel):
    """One message: text parts are strings, an integer part stands for the image of that number."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | int, ...]
    loss: bool = Field(default=True, description="Whether an answer is trained on and scored; true for other roles.")

    @property
    def text(self) -> str:
        """The text of the turn without its images."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()


class Sample(BaseModel):
    """A conversation about zero or more images that every later step can rely on."""

    # Files since 0.1.0 have the key `pictures`.
    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    id: str
    images: tuple[ImageRef, ...] = Field(alias="pictures")
    turns: tuple[Turn, ...]
    source: str = Field(description="File that the sample was read from, for error messages.")
    index: int | None = Field(default=None, description="Position among the samples of that file, from 0.")
    metric: str | None = Field(default=None, description="Metric of this sample, in place of the evaluation's own.")
    tags: tuple[str, ...] = Field(default=(), description="Groups that evaluation reports separately.")
    answers: tuple[str, ...] = Field(default=(), description="Accepted answers; empty for the scored turn alone.")

    @property
    def image_order(self) -> list[int]:
        """Numbers of the images, in the order of their placeholders in the text."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, int)]

    def up_to_scored_turn(self) -> "Sample":
        """The sample as evaluation sees it: its last turn is the last answer that is trained on, which is scored."""
        answers = [number for number, turn in enumerate(self.turns) if turn.role == "assistant" and turn.loss]
        if not answers or answers[-1] + 1 == len(self.turns):
            return self
        return self.model_copy(update={"turns": self.turns[: answers[-1] + 1]})


class Reject(BaseModel):
    """Why a sample is not used."""

    model_config = ConfigDict(frozen=True)

    file: str
    index: int | None = Field(default=None, description="Position among the samples of the file, from 0.")
    line: int | None = Field(default=None, description="Line of the file, from 1, that is not valid JSON.")
    id: str | None
    reason: str = Field(description="Stable code, for counting.")
    message: str = Field(description="One sentence for the reader of the report.")

    @property
    def place(self) -> str:
        """File and position of the sample, for messages."""
        return f"{self.file}, {f'line {self.line}' if self.index is None else f'sample {self.index}'}"


class DatasetInfo(BaseModel):
    """`dataset.json`: written last, so a folder without it is not a dataset."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    fingerprint: str = Field(description="sha256 of the content of all accepted samples, independent of addresses.")
    rows: dict[Split, int]
    rejected: dict[str, int] = Field(description="Number of rejected samples by reason.")
    noted: dict[str, int] = Field(default={}, description="Number of accepted samples by noteworthy property.")
    with_images: dict[Split, int] = Field(default={}, description="Number of samples that show an image.")
    ignored_fields: dict[str, int] = Field(
        default={}, description="Number of accepted samples by the name of a field that has no meaning."
    )
    exif_transpose: bool = Field(
        default=False,
        description="Whether images are rotated as EXIF says; a server of the model must then do the same.",
    )


class SampleError(Exception):
    """A sample cannot be used; the step that catches this error writes a `Reject`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # all arguments, so that the error can be pickled between processes
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


def read_info(dataset: Path) -> DatasetInfo:
    """The description of a finished dataset folder.

    Args:
        dataset: Folder written by validate_data.

    Raises:
        UserError: The folder is no finished dataset, or its schema is newer than this program.
    """
    return read_versioned(dataset / DATASET_FILE, DatasetInfo, SCHEMA_VERSION, made_by="validate-data")


def read_versioned(path: Path, model: type[Document], newest: int, made_by: str) -> Document:
    """Read the document that a step writes last, when its output is complete.

    Args:
        path: Path of the document.
        model: Type of the document; has a `schema_version`, which is 1 where a file states none.
        newest: The newest schema version that this program can read.
        made_by: Name of the command that writes the document.

    Raises:
        UserError: There is no such document, it is damaged, or its schema is newer than this program.
    """
    storage.require_no_file(str(path.parent))
    if not path.is_file():
        raise UserError(
            f"{path.parent}: no {path.name} here, so {made_by} has not finished; run `minicpmv-finetune {made_by}` "
            "first."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.get("schema_version", 1)
        if version <= newest:
            return model.model_validate(document)
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(repr(error).split())
        raise UserError(
            f"{path}: damaged or written by another program ({reason:.200}); run {made_by} again."
        ) from error
    raise UserError(
        f"{path}: schema version {version} is newer than this program's {newest}; upgrade minicpmv-finetune."
    )


def read_samples(dataset: Path, split: Split) -> Iterator[Sample]:
    """The accepted samples of one split, in their order.

    Args:
        dataset: Folder written by validate_data.
        split: `train` or `eval`.
    """
    with (dataset / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield Sample.model_validate_json(line)


def read_image(image: ImageRef) -> bytes:
    """An image's bytes, still encoded.

    Raises:
        UserError: The bytes differ from those that were validated.
    """
    content = image_files.read(image.uri, image.span)
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise UserError(f"{image_files.shortened(image.uri)}: changed since it was validated; run validate-data again.")
    return content


def decode_image(content: bytes, rotated: bool = False) -> Image.Image:
    """Decode an image's bytes without converting its mode; `rotated` is the attribute of its `ImageRef`."""
    return image_files.decode(content, rotated)


def open_image(image: ImageRef) -> Image.Image:
    """Read and decode an image, without converting its mode.

    Raises:
        UserError: The bytes differ from those that were validated.
    """
    return decode_image(read_image(image), image.rotated)


def content_digest(sample: Sample) -> str:
    """A hash of the texts, images and evaluation fields of a sample, without ids, addresses and image sizes."""
    content: dict[str, Any] = {
        "pictures": [image.sha256 for image in sample.images],
        "turns": [[turn.role, *turn.parts] for turn in sample.turns],
        "evaluation": [sample.metric, sample.tags, sample.answers],
    }
    if untrained := [number for number, turn in enumerate(sample.turns) if not turn.loss]:
        content["untrained"] = untrained  # absent otherwise, so that the digests of 0.1.0 stay
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class RejectLog:
    """Writes each reject to `rejects.jsonl` at once, so that memory does not grow with their number.

    The file gets its final name at the end of the `with` block, also when an exception ends the block: the list is
    most useful when the step fails. Only a step that fails without a reject leaves no list.

    Attributes:
        counts: Number of rejects by reason.
        examples: The first rejects of each reason.
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

    def __exit__(self, kind: object, *exception: object) -> None:
        self._file.close()
        if kind is None or self.counts:
            Path(self._file.name).replace(self.path)
        else:
            Path(self._file.name).unlink()

    def append(self, reject: Reject, split: Split) -> None:
        """Write one reject and count it."""
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
            UserError: Always; it names the first reject as an example, and the file of all rejects.
        """
        first = self._firsts.get(split)
        example = f"; the first is {first.place}: {first.message}" if first else "."
        raise UserError(f"{self.path}: no usable {split} sample is left, {self._splits[split]} were rejected{example}")

    def refuse_too_many(self, accepted: int, max_reject_ratio: float) -> None:
        """End the step if too many samples were rejected.

        Args:
            accepted: Number of accepted samples.
            max_reject_ratio: Largest allowed share of rejected samples.

        Raises:
            UserError: Too many were rejected; the message names the first reject, and the file of all rejects.
        """
        rejected = self.counts.total()
        total = accepted + rejected
        first = next(iter(self._firsts.values()), None)
        if first and rejected > max_reject_ratio * total:
            raise UserError(
                f"{self.path}: {rejected} of {total} samples ({rejected / total:.1%}) were rejected, more than "
                f"max_reject_ratio {max_reject_ratio:.1%} allows; fix them or raise it; the first is {first.place}: "
                f"{first.message}"
            )
