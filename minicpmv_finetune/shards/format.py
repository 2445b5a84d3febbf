"""Shards: Parquet files of prepared samples (tokenized and sliced), with one manifest.

A row contains token ids, labels, and images in one of the codecs of `codecs`; the trainer reads rows in random order.
Row groups have about `ROW_GROUP_BYTES`, so that a random read decodes little besides the wanted row, while a file is
large enough for object storage. `manifest.json` is written last and marks the shards as complete: without it they do
not exist. The files are beside the manifest, or at its `location` in object storage. From there, single rows are read
by ranged requests, and `cache.open_shards` makes a verified local copy.
"""

import io
import resource
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import Split, read_versioned
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import SlicingConfig

from .codecs import Codec, StoredImages, restore_slices, stored_sizes

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
CACHE_NAME = "shards-cache"  # folder beside the folders of local runs, where finished shards are kept for later runs
SHARED_CACHE_NAME = "minicpmv-shards"  # the same in a pipeline root, for the runs of all pipelines
ROW_GROUP_BYTES = 2**20
_CACHED_ROW_GROUPS = 16
_FILES_AT_ONCE = 8
_SPARE_FILES = 256  # open files that the rest of the program may need

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("layout", pa.list_(pa.int32())),  # see `codecs.StoredImages`
        ("pictures", pa.list_(pa.large_binary())),
    ]
)
# The codec has compressed the images already; `raw` images are read faster than any compression allows.
_COMPRESSION = {
    "id": "zstd",
    "input_ids.list.element": "zstd",
    "labels.list.element": "zstd",
    "layout.list.element": "zstd",
    "pictures.list.element": "none",
}


def _as_array(numbers: Iterable[int]) -> Sequence[int]:
    return numbers if isinstance(numbers, array) else array("i", numbers)


Numbers = Annotated[Sequence[int], PlainValidator(_as_array), PlainSerializer(list, return_type=list[int])]
"""One number for each row, a list in JSON: four bytes in memory, where a list of integers needs forty."""


class Shard(BaseModel):
    """One Parquet file of prepared samples."""

    model_config = ConfigDict(frozen=True)

    file: str
    rows: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: the shards, the data they were made from, and the settings."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    generation: str
    tokenizer_sha256: str
    max_slice_nums: int
    model_max_length: int
    patch_size: int
    pad_token_id: int
    codec: Codec = Field(description="Codec of the images.")
    slicing: dict[str, Any] = Field(description="Fields of SlicingConfig, which `source` needs for slicing.")
    data_fingerprint: str
    key: str = Field(description="Hash of everything that determines the shards; equal keys mean equal bytes.")
    location: str = Field(default="", description="URI of the folder of the files; empty for beside this manifest.")
    shards: dict[Split, list[Shard]]
    lengths: dict[Split, Numbers] = Field(description="Number of tokens of each row, in order.")
    slices: dict[Split, int] = Field(description="Number of slices of each split.")
    bytes: int = Field(description="Size of all Parquet files.")

    def rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return len(self.lengths.get(split, []))

    @property
    def files(self) -> list[Shard]:
        """All shards of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]


@dataclass(frozen=True)
class StoredRow:
    """A row as a shard stores it."""

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    images: StoredImages

    @property
    def bytes(self) -> int:
        """Approximate size of the row in the file."""
        return sum(len(part) for part in self.images.parts) + 8 * len(self.input_ids)


def slicing_fields(slicing: SlicingConfig) -> dict[str, Any]:
    """The fields of a slicing configuration, for a manifest."""
    return asdict(slicing)


def write_shard(path: Path, rows: Iterable[StoredRow]) -> Shard:
    """Write one Parquet file in constant memory; equal rows give equal bytes."""
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
    return Shard(file=path.name, rows=written, bytes=path.stat().st_size, sha256=storage.file_sha256(path))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished shards folder.

    Raises:
        UserError: There is no manifest, or its schema is newer than this program.
    """
    return read_versioned(folder / MANIFEST_FILE, Manifest, SCHEMA_VERSION, made_by="preprocess")


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded hash before its first use.

    Raises:
        UserError: A file is missing or differs.
    """
    for shard in damaged_shards(folder, manifest.files):
        path = folder / shard.file
        if not path.is_file():
            raise _missing(path)
        raise UserError(f"{path}: its content differs from {MANIFEST_FILE}; run preprocess again.")


def damaged_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards whose file in a folder is missing or differs from the recorded size or hash."""

    def is_whole(shard: Shard) -> bool:
        path = folder / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes and storage.file_sha256(path) == shard.sha256

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return [shard for shard, whole in zip(shards, pool.map(is_whole, shards), strict=True) if not whole]


class ShardReader(Sequence[ModelInput]):
    """Random access to the rows of one split; a pickled reader opens the files again in the other process.

    Files beside the manifest are memory-mapped. Other files are read from the manifest's `location` by row groups,
    whose checksums are compared at each read. With `images=False` no image is read, and rows have no slices.

    Raises:
        UserError: The folder contains no finished shards, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, split: Split, images: bool = True) -> None:
        self.folder = folder
        self.split = split
        self.images = images
        self.manifest = read_manifest(folder)
        self.slicing = SlicingConfig(**self.manifest.slicing)
        self._groups: list[tuple[pq.ParquetFile, int]] = []  # file of each row group, and its number in the file
        self._first_rows: list[int] = []
        self._length = 0
        for file in _open_all(folder, self.manifest, self.manifest.shards.get(split, [])):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((file, group))
                self._first_rows.append(self._length)
                self._length += file.metadata.row_group(group).num_rows
        # Neighboring rows are often read one after the other.
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

    def stored_rows(self) -> Iterator[StoredRow]:
        """The rows as they are stored, in order, without decoding an image; the images are buffers."""
        for group in range(len(self._groups)):
            table = self._decode_group(group)
            for number in range(len(table)):
                parts = [memoryview(image.as_buffer()) for image in table["pictures"][number]]
                ids, labels, layout = (_numbers(table[name][number]) for name in ("input_ids", "labels", "layout"))
                yield StoredRow(table["id"][number].as_py(), ids, labels, StoredImages(parts, layout))

    def slice_sizes(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The sizes of all slices, without decoding an image.

        Returns:
            (rows, columns) in patches of each slice of all rows, [slices, 2]; and the number of each row's first slice,
            [rows + 1].
        """
        sizes, counts = [np.zeros((0, 2), np.int32)], [np.zeros(1, np.int64)]
        for file in dict.fromkeys(file for file, _ in self._groups):
            layouts = file.read(["layout"], use_threads=False)["layout"].to_pylist()
            rows = [stored_sizes(layout, self.manifest.codec, self.slicing) for layout in layouts]
            sizes.append(np.array([size for row in rows for size in row], np.int32).reshape(-1, 2))
            counts.append(np.array([len(row) for row in rows], np.int64))
        return np.concatenate(sizes), np.concatenate(counts).cumsum()

    def _decode_group(self, group: int) -> pa.Table:
        file, number = self._groups[group]
        columns = None if self.images else ["id", "input_ids", "labels"]
        try:
            return file.read_row_group(number, columns, use_threads=False)
        except (OSError, pa.ArrowInvalid):
            # The bytes may have been damaged during the transfer; if the file is damaged, the second read fails too.
            try:
                return file.read_row_group(number, columns, use_threads=False)
            except (OSError, pa.ArrowInvalid) as error:
                place = self.manifest.location or self.folder
                raise UserError(f"{place}: damaged ({error}); delete it and run preprocess again.") from error

    def _row(self, table: pa.Table, number: int) -> ModelInput:
        try:
            return self._restore(table, number)
        except (
            OSError,
            ValueError,
            SyntaxError,
            LookupError,
            TypeError,
            pa.ArrowException,
        ) as error:  # raised by decoders
            place = self.manifest.location or self.folder
            raise UserError(f"{place}: an image is damaged ({error}); delete it and run preprocess again.") from error

    def _restore(self, table: pa.Table, number: int) -> ModelInput:
        slices = []
        if self.images:
            parts = [memoryview(image.as_buffer()) for image in table["pictures"][number]]
            slices = restore_slices(parts, table["layout"][number].as_py(), self.manifest.codec, self.slicing)
        return ModelInput(
            id=table["id"][number].as_py(),
            input_ids=_numbers(table["input_ids"][number]).copy(),
            labels=_numbers(table["labels"][number]).copy(),
            slices=slices,
        )


def _numbers(cell: Any) -> Any:
    """The numbers of a list in a table, as a read-only array; `to_numpy` would import pandas."""
    return np.from_dlpack(cell.values)


class _RemoteFile(io.RawIOBase):
    """A read-only file whose content is an object in a store, read by ranged requests."""

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
    def open_shard(shard: Shard) -> pq.ParquetFile:
        path = folder / shard.file
        if not path.is_file() and storage.is_object_uri(manifest.location):
            remote = _RemoteFile(storage.join(manifest.location, shard.file), shard.bytes)
            return _open(remote, remote.uri, pre_buffer=True, page_checksum_verification=True)
        if not path.is_file():
            raise _missing(path)
        return _open(path, str(path), memory_map=True)

    _allow_open_files(sum((folder / shard.file).is_file() for shard in shards), folder)
    # Opening a remote file includes a request for its footer.
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(open_shard, shards))


def _allow_open_files(files: int, folder: Path) -> None:
    """Raise this process's limit of open files, which is often 1,024, for shards that stay open.

    Raises:
        UserError: The limit may not be raised as far.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = _count_open_files()
    wanted = opened + files + _SPARE_FILES
    if limit == resource.RLIM_INFINITY or wanted <= limit:
        return
    if highest != resource.RLIM_INFINITY:
        if opened + files > highest:
            raise UserError(
                f"{folder}: has {files:,} shards, and a process may have {highest:,} files open here; raise the limit, "
                "which `ulimit -Hn` shows."
            )
        wanted = min(wanted, highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, highest))


def _count_open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def _open(source: Any, name: str, **options: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, **options)
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        raise UserError(f"{name}: damaged ({error}); run preprocess again.") from error


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: listed in {MANIFEST_FILE} but missing; run preprocess again.")


def _table(rows: Sequence[StoredRow]) -> pa.Table:
    """A table of rows, from buffers: `pa.array` imports pandas if it is installed, 0.4 s and 50 MB in each process."""
    numbers = [row.input_ids for row in rows], [row.labels for row in rows], [row.images.layout for row in rows]
    images = [row.images.parts for row in rows]
    columns = [
        _binaries([row.id.encode() for row in rows], pa.string(), np.int32),
        *(_lists(lists, _integers(lists)) for lists in numbers),
        _lists(images, _binaries([part for parts in images for part in parts], pa.large_binary(), np.int64)),
    ]
    return pa.table(columns, _SCHEMA)


def _lists(lists: Sequence[Sequence[Any]], values: pa.Array) -> pa.Array:
    """An array of lists, from the array of the values of all of them."""
    return pa.Array.from_buffers(
        pa.list_(values.type), len(lists), [None, _offsets(lists, np.int32)], children=[values]
    )


def _integers(lists: Iterable[Sequence[int]]) -> pa.Array:
    values = np.fromiter(chain.from_iterable(lists), np.int32)
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _binaries(items: Sequence[bytes | memoryview], kind: pa.DataType, offset: type[np.signedinteger[Any]]) -> pa.Array:
    return pa.Array.from_buffers(kind, len(items), [None, _offsets(items, offset), pa.py_buffer(b"".join(items))])


def _offsets(items: Iterable[Sized], kind: type[np.signedinteger[Any]]) -> pa.Buffer:
    """Where each item begins when they are one after the other, and where the last one ends."""
    return pa.py_buffer(np.cumsum([0, *map(len, items)], dtype=kind))
