"""Shards: the tokenised, sliced samples of a run, in Parquet files with one manifest.

A row holds token ids, labels and the uint8 pixels of its slices; the trainer reads rows at random. Row groups are
kept near `ROW_GROUP_BYTES`, so that a random read decodes little besides the row it wants, while a file is large enough
for object storage. `manifest.json` is written last and is the commit point: without it the shards do not exist.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from .errors import UserError
from .minicpmv.row import Row
from .samples import Split, read_versioned

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
ROW_GROUP_BYTES = 4 * 2**20
SHARD_BYTES = 128 * 2**20
_CACHED_ROW_GROUPS = 16

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("slice_sizes", pa.list_(pa.int32())),  # height, width of each slice in pixels, flattened
        ("pixels", pa.binary()),  # the slices' uint8 [height, width, 3] one after the other
    ]
)


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(frozen=True)

    file: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: what was prepared, from which data, with which settings."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    generation: str
    tokenizer_sha256: str
    max_slice_nums: int
    model_max_length: int
    patch_size: int
    pad_token_id: int
    data_fingerprint: str
    shards: dict[Split, list[Shard]]
    lengths: dict[Split, list[int]] = Field(description="tokens of each row, in order")
    slices: dict[Split, int] = Field(description="number of slices")
    bytes: int = Field(description="of all Parquet files")

    def rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return len(self.lengths.get(split, []))


class ShardWriter:
    """Writes the rows of one split into numbered files, in order, with flat memory."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.split = split
        self.shards: list[Shard] = []
        self.lengths: list[int] = []
        self.slices = 0
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._file_rows = 0
        self._file_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def append(self, row: Row) -> None:
        """Add a row; files and row groups are closed as they fill."""
        pixels = b"".join(np.ascontiguousarray(pixels).tobytes() for pixels in row.slices)
        self._pending.append(
            {
                "id": row.id,
                "input_ids": list(row.input_ids),
                "labels": list(row.labels),
                "slice_sizes": [side for pixels in row.slices for side in pixels.shape[:2]],
                "pixels": pixels,
            }
        )
        self._pending_bytes += len(pixels) + 8 * len(row.input_ids)
        self.lengths.append(len(row.input_ids))
        self.slices += len(row.slices)
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()
        if self._file_bytes >= SHARD_BYTES:
            self._close_file()

    def close(self) -> None:
        """Write what is left."""
        self._write_row_group()
        self._close_file()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.parquet"

    def _write_row_group(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            # zstd's fastest level: lossless, and faster to read back than the disk is.
            self._writer = pq.ParquetWriter(
                self._path, _SCHEMA, compression="zstd", compression_level=1, use_dictionary=False
            )
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=_SCHEMA))
        self._file_rows += len(self._pending)
        self._file_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def _close_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append(Shard(file=self._path.name, rows=self._file_rows, sha256=digest))
        self._file_rows = self._file_bytes = 0


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished shards folder.

    Raises:
        UserError: there is none, or it is of a newer schema.
    """
    return read_versioned(folder / MANIFEST_FILE, Manifest, SCHEMA_VERSION, made_by="preprocess")


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded hash, before its first use.

    Raises:
        UserError: a file is missing or differs.
    """
    for shards in manifest.shards.values():
        for shard in shards:
            path = folder / shard.file
            if not path.is_file():
                raise UserError(f"{path}: named in {MANIFEST_FILE} but missing; run preprocess again.")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise UserError(f"{path}: its content differs from {MANIFEST_FILE}; run preprocess again.")


class ShardReader(Sequence[Row]):
    """Random access to one split's rows; a copy sent to another process opens the files anew.

    Raises:
        UserError: the folder holds no finished shards, or a file is missing.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder = folder
        self.split = split
        self.manifest = read_manifest(folder)
        self._groups: list[tuple[pq.ParquetFile, int]] = []  # file and number within it of each row group
        self._first_rows: list[int] = []
        self._length = 0
        for shard in self.manifest.shards.get(split, []):
            file = _open(folder / shard.file)
            for group in range(file.metadata.num_row_groups):
                self._groups.append((file, group))
                self._first_rows.append(self._length)
                self._length += file.metadata.row_group(group).num_rows
        # Rows near each other are often read one after the other.
        self._read_group = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._decode_group)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, Split]]:
        return type(self), (self.folder, self.split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        if not 0 <= number < len(self):
            raise IndexError(position)
        group = bisect_right(self._first_rows, number) - 1
        return _row(self._read_group(group), number - self._first_rows[group])

    def _decode_group(self, group: int) -> pa.Table:
        file, number = self._groups[group]
        return file.read_row_group(number, use_threads=False)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise UserError(f"{path}: named in {MANIFEST_FILE} but missing; run preprocess again.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: damaged ({error}); run preprocess again.") from error


def _row(table: pa.Table, number: int) -> Row:
    # Copied, so that a batch does not keep whole row groups alive and torch gets memory it may write to.
    pixels = np.frombuffer(table["pixels"][number].as_buffer(), dtype=np.uint8).copy()
    sides = table["slice_sizes"][number].values.to_numpy(zero_copy_only=False)
    slices, start = [], 0
    for height, width in sides.reshape(-1, 2).tolist():
        end = start + height * width * 3
        slices.append(pixels[start:end].reshape(height, width, 3))
        start = end
    return Row(
        id=table["id"][number].as_py(),
        input_ids=table["input_ids"][number].values.to_numpy(zero_copy_only=False).copy(),
        labels=table["labels"][number].values.to_numpy(zero_copy_only=False).copy(),
        slices=slices,
    )
