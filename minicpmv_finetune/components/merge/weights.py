"""Safetensors files read and written a block at a time, so that memory does not grow with the model.

The library's writer wants every tensor in memory, and its reader maps whole files. The format itself is small: eight
bytes with the header's length, a JSON header with each tensor's type, shape and place, then the bytes
(https://huggingface.co/docs/safetensors). Since the header can be known before any value is, a file can be written
from front to back.
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
"""Of float32 values at a time: few enough to stay in the processor's cache from the first operation to the last."""

_BLOCKS_IN_FLIGHT = 8
_COPY_BYTES = 256 * 2**10
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file.

    Attributes:
        name: in the file.
        path: of the file.
        dtype: the format's name of the type, such as "BF16".
        shape: of the tensor.
        start: first byte within the file.
        size: in bytes.
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
    """One safetensors file's header."""

    path: Path
    metadata: dict[str, str]
    tensors: list[Stored]


@dataclass(frozen=True)
class Planned:
    """A tensor of the file to be written.

    Attributes:
        name: in the file.
        module: its name in the loaded model.
        source: where its present value lies.
    """

    name: str
    module: str
    source: Stored


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written."""

    name: str
    metadata: dict[str, str]
    tensors: list[Planned]

    def header(self) -> bytes:
        """What stands before the tensors' bytes."""
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
        # Readers map the file: the values must begin at a multiple of eight.
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


def read_headers(folder: Path) -> list[WeightFile]:
    """The safetensors files that make up a checkpoint or adapter folder, in order.

    Raises:
        UserError: there are none, one is missing, or one is damaged.
    """
    return [read_header(folder / name) for name in _file_names(folder)]


def find_index(folder: Path) -> Path | None:
    """The index of a sharded checkpoint."""
    return next(iter(sorted(folder.glob(f"*{INDEX_SUFFIX}"))), None)


def read_header(path: Path) -> WeightFile:
    """Read where a file's tensors lie.

    Raises:
        UserError: it is no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header names no tensors")
        metadata = header.pop("__metadata__", {})
        tensors = [
            Stored(
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
                raise ValueError(f"{tensor.name} takes {tensor.size} bytes, unlike its shape")
        end = max((tensor.start + tensor.size for tensor in tensors), default=8 + length)
        if path.stat().st_size != end:
            raise ValueError(f"{path.stat().st_size} bytes instead of {end}")
    except FileNotFoundError:
        raise UserError(f"{path}: named in the index but missing; fetch the checkpoint again.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); fetch the checkpoint again.") from error
    return WeightFile(path, metadata, sorted(tensors, key=lambda tensor: tensor.start))


def read_rows(tensor: Stored, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Some rows of a tensor, in its own type.

    Raises:
        UserError: the type is not a floating-point one of 16 bits or more.
    """
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}, which cannot be computed with; give the "
            "unquantized model."
        )
    end = tensor.rows if end is None else end
    row_size = tensor.size // max(tensor.rows, 1)
    shape = (end - start, *tensor.shape[1:]) if tensor.shape else ()
    values = torch.empty(shape, dtype=_DTYPES[tensor.dtype])
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start + start * row_size)
        _read_into(file, as_bytes(values))
    return values


def row_blocks(tensor: Stored) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose float32 values take about `BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // max(4 * prod(tensor.shape[1:]), 1))
    for start in range(0, tensor.rows, rows):
        yield start, min(start + rows, tensor.rows)


def cast(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round to a stored type."""
    return values.to(_DTYPES[dtype])


def as_bytes(values: torch.Tensor) -> memoryview:
    """A tensor's bytes as they are stored, not copied."""
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_files(
    folder: Path,
    files: Sequence[PlannedFile],
    blocks: Callable[[Planned], Iterable[memoryview] | None],
    on_done: Callable[[int], object],
) -> None:
    """Write safetensors files from front to back, and see them onto the disk.

    The disk has a thread of its own, so that the next block is computed while one is written and the next file while
    one is being synced.

    Args:
        folder: of the new files.
        files: what they hold, in the order in which it shall lie.
        blocks: gives a tensor's new bytes, as many as the source has, or None for those of the source.
        on_done: told the number of bytes written, from the disk's thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk") as disk:
        pending: deque[Future[object]] = deque()

        def later(job: Callable[..., object], *arguments: object) -> None:
            pending.append(disk.submit(job, *arguments))
            while len(pending) > _BLOCKS_IN_FLIGHT:
                pending.popleft().result()

        for planned in files:
            header = planned.header()
            file = (folder / planned.name).open("wb")
            later(file.write, header)
            for tensor in planned.tensors:
                changed = blocks(tensor)
                if changed is None:
                    later(_copy, file, tensor.source, on_done)
                    continue
                for block in changed:
                    later(_write, file, block, on_done)
            later(_finish, file, len(header) + sum(tensor.source.size for tensor in planned.tensors))
        while pending:
            pending.popleft().result()


def write_index(base: Path, folder: Path, files: Sequence[PlannedFile]) -> None:
    """Write the index of a sharded checkpoint, with the base's other entries kept."""
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


def _copy(file: BufferedWriter, tensor: Stored, on_done: Callable[[int], object]) -> None:
    # One small buffer that stays in the processor's cache: large ones cost more than the disk does.
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
        raise RuntimeError(f"{file.name}: {file.tell()} bytes written, {size} announced")
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _file_names(folder: Path) -> list[str]:
    index = find_index(folder)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a file outside the folder is named")
            return names
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: no index of weights ({error}); fetch the checkpoint again.") from error
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return [name]
    raise UserError(f"{folder}: no safetensors weights here; give a checkpoint that has them.")


def _read_into(file: BinaryIO, target: memoryview) -> None:
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name}: ends too early; fetch the checkpoint again.")
        target = target[count:]
