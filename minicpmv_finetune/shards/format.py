"""Shards: the tokenized, sliced samples of a run, in Parquet files with one manifest.

A row holds token ids, labels and images in one of the codecs of `shards.codecs`; the trainer reads rows at random.
Row groups are kept near `ROW_GROUP_BYTES`, so that a random read decodes little besides the row it wants, while a file
is large enough for object storage. `manifest.json` is written last and is the commit point: without it the shards do
not exist. The files lie beside it, or at the manifest's `location`; from there single rows are read by ranged requests,
and `shard_cache.open_shards` makes a verified copy here.
"""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import Split, read_versioned
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import SlicingConfig

from .codecs import Codec, StoredImages, restore_slices, stored_sizes

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
CACHE_NAME = "shards-cache"  # folder beside the runs' folders, where finished shards are kept for later runs
ROW_GROUP_BYTES = 2**20
_CACHED_ROW_GROUPS = 16
_HASHING_THREADS = 8

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("layout", pa.list_(pa.int32())),  # see shards.codecs
        ("pictures", pa.list_(pa.large_binary())),
    ]
)
# Images are as small as their codec makes them; `raw` ones are read faster than any compression.
_COMPRESSION = {
    "id": "zstd",
    "input_ids.list.element": "zstd",
    "labels.list.element": "zstd",
    "layout.list.element": "zstd",
    "pictures.list.element": "none",
}


class Shard(BaseModel):
    """One Parquet file."""

    model_config = ConfigDict(frozen=True)

    file: str
    rows: int
    bytes: int
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
    codec: Codec = Field(description="how images are stored")
    slicing: dict[str, Any] = Field(description="the fields of SlicingConfig; `source` slices with them")
    data_fingerprint: str
    key: str = Field(description="of everything that decides the shards; equal keys, equal bytes")
    location: str = Field(default="", description="URI of the folder with the files; empty: beside this manifest")
    shards: dict[Split, list[Shard]]
    lengths: dict[Split, list[int]] = Field(description="tokens of each row, in order")
    slices: dict[Split, int] = Field(description="number of slices")
    bytes: int = Field(description="of all Parquet files")

    def rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return len(self.lengths.get(split, []))

    @property
    def files(self) -> list[Shard]:
        """All shards of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]


@dataclass(frozen=True)
class StoredRow:
    """A row as a shard holds it."""

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    images: StoredImages

    @property
    def bytes(self) -> int:
        """About what it takes in the file."""
        return sum(len(part) for part in self.images.parts) + 8 * len(self.input_ids)


def slicing_fields(slicing: SlicingConfig) -> dict[str, Any]:
    """A slicing configuration as a manifest says it."""
    return asdict(slicing)


def write_shard(path: Path, rows: Iterable[StoredRow]) -> Shard:
    """Write one Parquet file, in flat memory; equal rows give equal bytes."""
    pending: list[StoredRow] = []
    pending_bytes = written = 0
    with pq.ParquetWriter(
        path, _SCHEMA, compression=_COMPRESSION, use_dictionary=False, write_page_checksum=True, write_statistics=False
    ) as writer:
        for row in rows:
            pending.append(row)
            pending_bytes += row.bytes
            written += 1
            if pending_bytes >= ROW_GROUP_BYTES:
                writer.write_table(_table(pending))
                pending, pending_bytes = [], 0
        if pending:
            writer.write_table(_table(pending))
    return Shard(file=path.name, rows=written, bytes=path.stat().st_size, sha256=_sha256(path))


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
    for shard in damaged_shards(folder, manifest.files):
        path = folder / shard.file
        if not path.is_file():
            raise _missing(path)
        raise UserError(f"{path}: its content differs from {MANIFEST_FILE}; run preprocess again.")


def damaged_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Those whose file in a folder is missing or not the one that was written."""

    def is_whole(shard: Shard) -> bool:
        path = folder / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes and _sha256(path) == shard.sha256

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return [shard for shard, whole in zip(shards, pool.map(is_whole, shards), strict=True) if not whole]


class ShardReader(Sequence[ModelInput]):
    """Random access to one split's rows; a copy sent to another process opens the files anew.

    Files that lie beside the manifest are memory-mapped. Others are read from its `location` row group by row group,
    whose checksums are compared each time. Without images their bytes are not read, and rows come without slices.

    Raises:
        UserError: the folder holds no finished shards, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, split: Split, images: bool = True) -> None:
        self.folder = folder
        self.split = split
        self.images = images
        self.manifest = read_manifest(folder)
        self._slicing = SlicingConfig(**self.manifest.slicing)
        self._groups: list[tuple[pq.ParquetFile, int]] = []  # file and number within it of each row group
        self._first_rows: list[int] = []
        self._length = 0
        for file in _open_all(folder, self.manifest, self.manifest.shards.get(split, [])):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((file, group))
                self._first_rows.append(self._length)
                self._length += file.metadata.row_group(group).num_rows
        # Rows near each other are often read one after the other.
        self._read_group = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._decode_group)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, Split, bool]]:
        return type(self), (self.folder, self.split, self.images)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        if not 0 <= number < len(self):
            raise IndexError(position)
        group = bisect_right(self._first_rows, number) - 1
        return self._row(self._read_group(group), number - self._first_rows[group])

    def slice_sizes(self) -> list[list[tuple[int, int]]]:
        """(rows, columns) in patches of each slice of each row, told without decoding an image."""
        return [
            stored_sizes(layout, self.manifest.codec, self._slicing)
            for file in dict.fromkeys(file for file, _ in self._groups)
            for layout in file.read(["layout"], use_threads=False)["layout"].to_pylist()
        ]

    def _decode_group(self, group: int) -> pa.Table:
        file, number = self._groups[group]
        columns = None if self.images else ["id", "input_ids", "labels"]
        try:
            return file.read_row_group(number, columns, use_threads=False)
        except (OSError, pa.ArrowInvalid):
            # On its way here, perhaps; damaged in the store, it is so again.
            try:
                return file.read_row_group(number, columns, use_threads=False)
            except (OSError, pa.ArrowInvalid) as error:
                place = self.manifest.location or self.folder
                raise UserError(f"{place}: damaged ({error}); delete it and run preprocess again.") from error

    def _row(self, table: pa.Table, number: int) -> ModelInput:
        try:
            return self._restored(table, number)
        except (OSError, ValueError, SyntaxError, LookupError, TypeError, pa.ArrowException) as error:  # of decoders
            place = self.manifest.location or self.folder
            raise UserError(f"{place}: an image is damaged ({error}); delete it and run preprocess again.") from error

    def _restored(self, table: pa.Table, number: int) -> ModelInput:
        slices = []
        if self.images:
            parts = [memoryview(image.as_buffer()) for image in table["pictures"][number]]
            slices = restore_slices(parts, table["layout"][number].as_py(), self.manifest.codec, self._slicing)
        return ModelInput(
            id=table["id"][number].as_py(),
            input_ids=table["input_ids"][number].values.to_numpy(zero_copy_only=False).copy(),
            labels=table["labels"][number].values.to_numpy(zero_copy_only=False).copy(),
            slices=slices,
        )


class _RemoteFile(io.RawIOBase):
    """An object in a store as a file that is read by ranged requests."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri = uri
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        length = self.size - self.position if size < 0 else min(size, self.size - self.position)
        content = storage.read_bytes(self.uri, (self.position, length)) if length > 0 else b""
        self.position += len(content)
        return content


def _open_all(folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> list[pq.ParquetFile]:
    def opened(shard: Shard) -> pq.ParquetFile:
        path = folder / shard.file
        if not path.is_file() and storage.is_object_uri(manifest.location):
            remote = _RemoteFile(storage.join(manifest.location, shard.file), shard.bytes)
            return _open(remote, remote.uri, pre_buffer=True, page_checksum_verification=True)
        if not path.is_file():
            raise _missing(path)
        return _open(path, str(path), memory_map=True)

    # Opening a remote file waits for its footer.
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return list(pool.map(opened, shards))


def _open(source: Any, name: str, **options: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, **options)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: damaged ({error}); run preprocess again.") from error


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: named in {MANIFEST_FILE} but missing; run preprocess again.")


def _table(rows: Sequence[StoredRow]) -> pa.Table:
    columns = [
        [row.id for row in rows],
        [row.input_ids for row in rows],
        [row.labels for row in rows],
        [row.images.layout for row in rows],
        [row.images.parts for row in rows],
    ]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
