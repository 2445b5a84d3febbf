"""Safetensors files read and written a block at a time, so that memory does not grow with the model.

The library's writer needs every tensor in memory, and its reader maps whole files. The format itself is small: eight
bytes with the length of the header, a JSON header with the type, shape and position of each tensor, then the bytes of
the tensors (https://huggingface.co/docs/safetensors). Since the header can be computed before any value, a file can be
written from front to back.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from minicpmv_finetune.errors import UserError

INDEX_SUFFIX = ".safetensors.index.json"
BLOCK_BYTES = 2**20
"""Size of a block of float32 values: small enough to stay in the processor's cache through all operations on it."""

_BLOCKS_IN_FLIGHT = 8
_COPY_BYTES = 256 * 2**10
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # limit of the format


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in a file.

    Attributes:
        name: Name of the tensor in the file.
        path: Path of the file.
        dtype: Name of the type in the format, such as "BF16".
        shape: Shape of the tensor.
        start: Position of the tensor's first byte in the file.
        size: Size of the tensor in bytes.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar has one row."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class WeightFile:
    """The header of a safetensors file.

    Attributes:
        path: Path of the file.
        metadata: Free-form metadata of the file.
        tensors: Tensors in the order of their bytes.
    """

    path: Path
    metadata: dict[str, str]
    tensors: list[StoredTensor]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of a file to be written.

    Attributes:
        name: Name of the tensor in the new file.
        module: Name of the tensor in the loaded model.
        source: The base's tensor, whose values are copied or changed.
    """

    name: str
    module: str
    source: StoredTensor


@dataclass(frozen=True)
class OutputFile:
    """A file to be written.

    Attributes:
        name: Name of the file.
        metadata: Free-form metadata of the file.
        tensors: Tensors in the order in which they are written.
    """

    name: str
    metadata: dict[str, str]
    tensors: list[OutputTensor]

    def header(self) -> bytes:
        """The bytes of the file before the tensors' bytes."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        offset = 0
        for tensor in self.tensors:
            header[tensor.name] = {
                "dtype": tensor.source.dtype,
                "shape": list(tensor.source.shape),
                "data_offsets": [offset, offset + tensor.source.size],
            }
            offset += tensor.source.size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # Readers map the file into memory, so the values must begin at a multiple of eight.
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


def read_headers(folder: Path) -> list[WeightFile]:
    """Read the headers of a checkpoint's or adapter's safetensors files, in the order of their names.

    Raises:
        UserError: The folder has no such file, or a file is missing or damaged.
    """
    return [read_header(folder / name) for name in _file_names(folder)]


def find_index(folder: Path) -> Path | None:
    """The index of a sharded checkpoint; None for a checkpoint in one file."""
    return next(iter(sorted(folder.glob(f"*{INDEX_SUFFIX}"))), None)


def read_header(path: Path) -> WeightFile:
    """Read the header of a safetensors file.

    Raises:
        UserError: The file is missing, or is not a complete safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object of tensors")
        metadata = header.pop("__metadata__", {})
        tensors = [
            StoredTensor(
                name,
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
        for tensor in tensors:
            if tensor.dtype in _DTYPES and tensor.size != prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize:
                raise ValueError(f"{tensor.name} has {tensor.size} bytes, which do not match its shape and type")
        end = max((tensor.start + tensor.size for tensor in tensors), default=8 + length)
        if path.stat().st_size != end:
            raise ValueError(f"{path.stat().st_size} bytes instead of {end}")
    except FileNotFoundError:
        raise UserError(f"{path}: the index names this file, but it is missing; fetch the checkpoint again.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); fetch the checkpoint again.") from error
    return WeightFile(path, metadata, sorted(tensors, key=lambda tensor: tensor.start))


def read_rows(tensor: StoredTensor, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Read some rows of a tensor, in its stored type.

    Raises:
        UserError: The type is not a floating-point type of 16 bits or more.
    """
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}, which cannot be merged; give the unquantized "
            "model."
        )
    end = tensor.rows if end is None else end
    row_size = tensor.size // max(tensor.rows, 1)
    shape = (end - start, *tensor.shape[1:]) if tensor.shape else ()
    values = torch.empty(shape, dtype=_DTYPES[tensor.dtype])
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start + start * row_size)
        _read_into(file, as_bytes(values))
    return values


def row_blocks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose float32 values take at most `BLOCK_BYTES`, or of a single larger row."""
    rows = max(1, BLOCK_BYTES // max(4 * prod(tensor.shape[1:]), 1))
    for start in range(0, tensor.rows, rows):
        yield start, min(start + rows, tensor.rows)


def cast(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round to a stored type."""
    return values.to(_DTYPES[dtype])


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor in the order of the file, without a copy where the tensor is contiguous."""
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_files(
    folder: Path,
    files: Sequence[OutputFile],
    blocks: Callable[[OutputTensor], Iterable[memoryview] | None],
    on_done: Callable[[int], object],
) -> None:
    """Write safetensors files from front to back, and wait until they are on the disk.

    A thread of its own writes, so that the next block is computed while one block is written, and the next file while
    one file is synced to the disk.

    Args:
        folder: Folder of the new files.
        files: Content of the files, in the order in which it is written.
        blocks: Returns the new bytes of a tensor, as many as the source has, or None to copy the source's bytes.
        on_done: Is called with the number of bytes written, in the thread that writes.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk") as disk:
        pending: deque[Future[object]] = deque()

        def submit(job: Callable[..., object], *arguments: object) -> None:
            pending.append(disk.submit(job, *arguments))
            while len(pending) > _BLOCKS_IN_FLIGHT:
                pending.popleft().result()

        for output in files:
            header = output.header()
            file = (folder / output.name).open("wb")
            submit(file.write, header)
            for tensor in output.tensors:
                changed = blocks(tensor)
                if changed is None:
                    submit(_copy, file, tensor.source, on_done)
                    continue
                for block in changed:
                    submit(_write, file, block, on_done)
            submit(_finish, file, len(header) + sum(tensor.source.size for tensor in output.tensors))
        while pending:
            pending.popleft().result()


def write_index(base: Path, folder: Path, files: Sequence[OutputFile]) -> None:
    """Write the index of a sharded checkpoint; entries of the base's index that are not about tensors are kept."""
    index = find_index(base)
    if index is None:
        return
    document = json.loads(index.read_text())
    written = [tensor for file in files for tensor in file.tensors]
    document["weight_map"] = {tensor.name: file.name for file in files for tensor in file.tensors}
    document["metadata"] = {
        **document.get("metadata", {}),
        "total_size": sum(tensor.source.size for tensor in written),
    }
    if "total_parameters" in document["metadata"]:
        document["metadata"]["total_parameters"] = sum(prod(tensor.source.shape) for tensor in written)
    (folder / index.name).write_text(json.dumps(document, indent=2) + "\n")


def _write(file: BufferedWriter, block: memoryview, on_done: Callable[[int], object]) -> None:
    file.write(block)
    on_done(len(block))


def _copy(file: BufferedWriter, tensor: StoredTensor, on_done: Callable[[int], object]) -> None:
    # One small buffer that stays in the processor's cache: large buffers cost more time than the disk.
    buffer = memoryview(bytearray(_COPY_BYTES))
    with tensor.path.open("rb", buffering=0) as source:
        source.seek(tensor.start)
        for done in range(0, tensor.size, _COPY_BYTES):
            block = buffer[: min(_COPY_BYTES, tensor.size - done)]
            _read_into(source, block)
            file.write(block)
            on_done(len(block))


def _finish(file: BufferedWriter, size: int) -> None:
    if file.tell() != size:
        raise RuntimeError(f"{file.name}: {file.tell()} bytes were written, but the header announces {size}")
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _file_names(folder: Path) -> list[str]:
    index = find_index(folder)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names a file outside the folder")
            return names
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of weights ({error}); fetch the checkpoint again.") from error
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [name]
    raise UserError(f"{folder}: there are no safetensors weights here; give a checkpoint that has them.")


def _read_into(file: BinaryIO, target: memoryview) -> None:
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name}: the file ends too early; fetch the checkpoint again.")
        target = target[count:]
