"""Cut a dataset into shards, and compute one key from everything that determines the bytes of the shards.

The borders of the shards depend only on the samples, never on the number of processes or pods that share the work. So
each shard is a separate task with the same result in every process. The key is the name of the folder where finished
shards are stored; every process with the same data and settings finds them there: a retry after a killed attempt, the
other pods of a run, and the next run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import DatasetInfo, Sample, Split
from minicpmv_finetune.minicpmv.slicing import SlicePlan, SlicingConfig, plan_slices
from minicpmv_finetune.shards import format
from minicpmv_finetune.shards.codecs import Codec
from minicpmv_finetune.shards.encoding import ENCODING_VERSION
from minicpmv_finetune.shards.format import SCHEMA_VERSION, Numbers, Shard, slicing_fields

SPLITS: tuple[Split, ...] = ("train", "eval")
SHARD_BYTES = 64 * 2**20  # estimated size of a file: large enough for object storage, small enough to share the work
SHARD_ROWS = 8192  # most rows of a shard, so that small samples too are shared between processes

_BYTES_PER_PIXEL: dict[Codec, float] = {"source": 0.5, "raw": 3.0, "webp-lossless": 1.0, "png": 1.4}
_BYTES_PER_CHARACTER = 3
# The files of a checkpoint that determine tokens or slices; a missing file determines nothing.
_BASE_FILES = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "merges.txt"),
)
LIBRARIES = ("pillow", "pyarrow", "tokenizers", "torchvision", "transformers")
"""The libraries whose versions are part of the key. Changes of this package are covered by `ENCODING_VERSION`."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        split: Split of the samples.
        number: Number of the shard within its split.
        offset: Position of the first byte of the shard's samples in the file of the split.
        rows: Number of samples in the shard, before any is rejected.
        images: Number of images of these samples.
    """

    split: Split
    number: int
    offset: int
    rows: int
    images: int

    @property
    def name(self) -> str:
        """Name of the shard's files, without a suffix."""
        return f"{self.split}-{self.number:05d}"


class RejectedRow(BaseModel):
    """A sample that was rejected while its shard was written."""

    model_config = ConfigDict(frozen=True)

    row: int = Field(description="Position among the samples of the shard's task, from 0.")
    reason: str
    message: str


class ShardRecord(BaseModel):
    """The description of a finished shard; it is written last, so a shard without it is not finished."""

    model_config = ConfigDict(frozen=True)

    shard: Shard
    lengths: Numbers = Field(description="Number of tokens of each row.")
    slices: Numbers = Field(description="Number of slices of each row.")
    rejected: list[RejectedRow]


@dataclass(frozen=True)
class DatasetShards:
    """The shards of a dataset.

    Attributes:
        tasks: The tasks of all shards, in the order of their rows.
        key: Hash of everything that determines the bytes of the shards.
    """

    tasks: tuple[ShardTask, ...]
    key: str


def cut_into_shards(
    dataset: Path, info: DatasetInfo, base_model: Path, slicing: SlicingConfig, model_max_length: int, codec: Codec
) -> DatasetShards:
    """Cut a dataset into shards by the sizes of its samples, in one pass and constant memory."""
    tasks: list[ShardTask] = []
    digest = hashlib.sha256()
    plan = lru_cache(maxsize=4096)(lambda width, height: plan_slices(width, height, slicing))
    for split in SPLITS:
        number = start = offset = rows = images = 0
        size = 0.0
        with (dataset / f"{split}.jsonl").open("rb") as lines:
            for line in lines:
                sample = Sample.model_validate_json(line)
                digest.update(_row_content(sample))
                size += sum(
                    _image_bytes(plan(image.width, image.height), image.width * image.height, codec)
                    for image in sample.images
                )
                size += _BYTES_PER_CHARACTER * sum(len(turn.text) for turn in sample.turns)
                offset += len(line)
                rows += 1
                images += len(sample.images)
                if size >= SHARD_BYTES or rows == SHARD_ROWS:
                    tasks.append(ShardTask(split, number, start, rows, images))
                    number, start, rows, images, size = number + 1, offset, 0, 0, 0.0
        if rows:
            tasks.append(ShardTask(split, number, start, rows, images))
        digest.update(split.encode())
    determining = {
        "encoding": ENCODING_VERSION,
        "schema": SCHEMA_VERSION,
        "layout": [SHARD_BYTES, SHARD_ROWS, format.ROW_GROUP_BYTES],
        "samples": digest.hexdigest(),
        "fingerprint": info.fingerprint,
        "base_model": {
            name: storage.file_sha256(base_model / name) for name in _BASE_FILES if (base_model / name).is_file()
        },
        "slicing": slicing_fields(slicing),
        "model_max_length": model_max_length,
        "codec": codec,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:32]
    return DatasetShards(tuple(tasks), key)


def read_task_samples(task: ShardTask, dataset: Path) -> Iterator[Sample]:
    """The samples of one shard, in their order."""
    with (dataset / f"{task.split}.jsonl").open("rb") as lines:
        lines.seek(task.offset)
        for _ in range(task.rows):
            yield Sample.model_validate_json(lines.readline())


def _image_bytes(plan: SlicePlan, pixels: int, codec: Codec) -> float:
    """The estimated size of a stored image; `pixels` is the number of pixels of the original."""
    if codec != "source":
        pixels = sum(rows * columns for rows, columns in plan.target_sizes) * plan.patch_size**2
    return pixels * _BYTES_PER_PIXEL[codec]


def _row_content(sample: Sample) -> bytes:
    """The part of a sample that determines its row: everything except the addresses of the sample and its images."""
    return json.dumps(
        [
            sample.id,
            [[image.sha256, image.width, image.height, image.rotated] for image in sample.images],
            [[turn.role, turn.loss, *turn.parts] for turn in sample.turns],
        ]
    ).encode()
