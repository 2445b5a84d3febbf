"""The work cut into shards: which samples each holds, and one key for everything that decides their bytes.

A shard's borders depend on the samples alone, never on how many processes or pods share the work; so each shard is a
unit of work that anybody may do, with the same result. The key names the place where finished shards are kept, and
whoever has the same work to do finds them there: an attempt that was killed, the other pods of a run, the next run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.data import image_files, samples
from minicpmv_finetune.data.samples import DatasetInfo, Sample, Split
from minicpmv_finetune.minicpmv import conversation, generations, resampling, slicing
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.slicing import SlicePlan
from minicpmv_finetune.shards import codecs as codecs
from minicpmv_finetune.shards import encoding, format
from minicpmv_finetune.shards.codecs import Codec
from minicpmv_finetune.shards.format import SCHEMA_VERSION, Shard, slicing_fields

SPLITS: tuple[Split, ...] = ("train", "eval")
SHARD_BYTES = 64 * 2**20  # of a file, by the estimate below: large enough for object storage, small enough to share
SHARD_ROWS = 8192  # so that small samples too are shared between processes

_BYTES_PER_PIXEL: dict[Codec, float] = {"source": 0.5, "raw": 3.0, "webp-lossless": 1.0, "png": 1.4}
_BYTES_PER_CHARACTER = 3
# Whatever of a checkpoint decides tokens or slices; what is not there decides nothing.
_BASE_FILES = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "merges.txt"),
)
_CODE = (codecs, image_files, samples, format, conversation, generations, resampling, slicing, encoding)
_LIBRARIES = ("minicpmv-finetune", "pillow", "pyarrow", "tokenizers", "torchvision", "transformers")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        split: whose samples.
        number: of the shard within its split.
        offset: first byte of its samples in the split's file.
        rows: number of its samples, before any is rejected.
        images: number of their images.
    """

    split: Split
    number: int
    offset: int
    rows: int
    images: int

    @property
    def name(self) -> str:
        """Of its files, without a suffix."""
        return f"{self.split}-{self.number:05d}"


class RejectedRow(BaseModel):
    """A sample that did not become a row."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="position among the samples of the shard's task, from 0")
    reason: str
    message: str


class ShardRecord(BaseModel):
    """What is known of a written shard; written last, so a shard without it does not exist."""

    model_config = ConfigDict(frozen=True)

    shard: Shard
    lengths: list[int] = Field(description="tokens of each row")
    slices: list[int] = Field(description="slices of each row")
    rejected: list[RejectedRow]


@dataclass(frozen=True)
class Work:
    """All that is to be done for a dataset.

    Attributes:
        tasks: the shards, in the order of their rows.
        key: of everything that decides their bytes.
    """

    tasks: tuple[ShardTask, ...]
    key: str


def plan_work(
    dataset: Path, info: DatasetInfo, base_model: Path, encoder: Encoder, model_max_length: int, codec: Codec
) -> Work:
    """Cut a dataset into shards by its samples' sizes, in one pass and flat memory."""
    tasks: list[ShardTask] = []
    digest = hashlib.sha256()
    plan = lru_cache(maxsize=4096)(lambda width, height: slicing.plan_slices(width, height, encoder.slicing))
    for split in SPLITS:
        number = start = offset = count = shown = 0
        size = 0.0
        with (dataset / f"{split}.jsonl").open("rb") as lines:
            for line in lines:
                sample = Sample.model_validate_json(line)
                digest.update(_content(sample))
                size += sum(
                    _bytes(plan(image.width, image.height), image.width * image.height, codec)
                    for image in sample.images
                )
                size += _BYTES_PER_CHARACTER * sum(len(turn.text) for turn in sample.turns)
                offset += len(line)
                count += 1
                shown += len(sample.images)
                if size >= SHARD_BYTES or count == SHARD_ROWS:
                    tasks.append(ShardTask(split, number, start, count, shown))
                    number, start, count, shown, size = number + 1, offset, 0, 0, 0.0
        if count:
            tasks.append(ShardTask(split, number, start, count, shown))
        digest.update(split.encode())
    identity = {
        "schema": SCHEMA_VERSION,
        "layout": [SHARD_BYTES, SHARD_ROWS, format.ROW_GROUP_BYTES],
        "samples": digest.hexdigest(),
        "fingerprint": info.fingerprint,
        "base_model": {name: _sha256(base_model / name) for name in _BASE_FILES if (base_model / name).is_file()},
        "slicing": slicing_fields(encoder.slicing),
        "model_max_length": model_max_length,
        "codec": codec,
        # A fix in the program makes other shards of the same data.
        "code": [_sha256(Path(str(module.__file__))) for module in _CODE],
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return Work(tuple(tasks), hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32])


def samples_of(task: ShardTask, dataset: Path) -> Iterator[Sample]:
    """The samples of one shard, in their order."""
    with (dataset / f"{task.split}.jsonl").open("rb") as lines:
        lines.seek(task.offset)
        for _ in range(task.rows):
            yield Sample.model_validate_json(lines.readline())


def _bytes(plan: SlicePlan, pixels: int, codec: Codec) -> float:
    if codec != "source":
        pixels = sum(rows * columns for rows, columns in plan.target_sizes) * plan.patch_size**2
    return pixels * _BYTES_PER_PIXEL[codec]


def _content(sample: Sample) -> bytes:
    """What of a sample decides its row: all but where it and its images lie."""
    return json.dumps(
        [
            sample.id,
            [[image.sha256, image.width, image.height, image.turned] for image in sample.images],
            [[turn.role, *turn.parts] for turn in sample.turns],
        ]
    ).encode()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
