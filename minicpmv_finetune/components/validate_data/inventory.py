"""Compact facts of every accepted sample, in files, while the samples themselves are written to a file too.

Memory does not grow with the number of samples while they are read: of each, 32 bytes are written, and 820 of each
image, most of them the 16 × 16 pixels by which copies are found. The files are mapped into memory afterwards, so that
Linux can drop their pages. Hashes are sorted in parts, a 256th of them at once.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.data.checking import MINIATURE_SIDE, AcceptedSample

# Hashes are big-endian integers, because numpy cannot sort raw bytes and drops trailing zeros of byte strings.
_HASH = np.dtype((">u8", 4))
_IMAGE = np.dtype([("sample", "<u4"), ("sha256", _HASH), ("address", "<u8"), ("width", "<u4"), ("height", "<u4")])
_IMAGE_ROW = struct.Struct("<I32s8sII")
_NAMED_FIELDS = 1000  # names that are counted one by one, so that memory does not grow with the number of names


@dataclass
class Inventory:
    """All accepted samples, in the order in which they were accepted.

    Attributes:
        folder: Folder for the files.
        notes: Number of samples by the code of a noteworthy property.
        turns: Number of samples by their number of turns.
        images: Number of samples by their number of images.
        ignored: Number of samples by the name of a field that has no meaning.
    """

    folder: Path
    notes: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    _samples: int = 0

    def __enter__(self) -> "Inventory":
        self._lines = self.lines.open("w", encoding="utf-8")
        self._digests, self._images, self._miniatures = (
            (self.folder / name).open("wb") for name in ("digests", "images", "miniatures")
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._lines, self._digests, self._images, self._miniatures):
            file.close()

    def __len__(self) -> int:
        return self._samples

    @property
    def lines(self) -> Path:
        """File of the samples, one per line."""
        return self.folder / "samples.jsonl"

    def add(self, accepted: AcceptedSample) -> None:
        """Add a sample."""
        for image in accepted.images:
            ref = image.ref
            address = hashlib.blake2b(ref.uri.encode(errors="replace"), digest_size=8).digest()
            self._images.write(
                _IMAGE_ROW.pack(self._samples, bytes.fromhex(ref.sha256), address, ref.width, ref.height)
            )
            self._miniatures.write(image.miniature)
        self._digests.write(accepted.digest)
        self._lines.write(f"{accepted.line}\n")
        self._samples += 1
        self.notes.update(accepted.notes)
        self.turns[accepted.turns] += 1
        self.images[len(accepted.images)] += 1
        for name in accepted.ignored:
            self.ignored[name if name in self.ignored or len(self.ignored) < _NAMED_FIELDS else "…"] += 1

    def digests(self) -> NDArray[np.uint64]:
        """The hash of each sample's content, [samples, 4]."""
        return _mapped(self.folder / "digests", _HASH)

    def image_rows(self) -> NDArray[np.void]:
        """A row for each image of each sample: `sample`, `sha256`, `address` (hashed), `width` and `height`."""
        return _mapped(self.folder / "images", _IMAGE)

    @cached_property
    def distinct_images(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The first row of each image, in the order of the hashes, and the number of each row's image."""
        return numbered(self.image_rows()["sha256"])

    def stored(self, name: str, dtype: np.dtype[Any], parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
        """Write arrays into a file of the folder, one after the other, and return all as one that is mapped."""
        with (self.folder / name).open("wb") as file:
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        return _mapped(self.folder / name, dtype)

    def read_miniatures(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """The images at some rows of `image_rows` in 16 × 16 RGB pixels, [rows, 16, 16, 3]."""
        size = MINIATURE_SIDE * MINIATURE_SIDE * 3
        pixels = np.empty((len(rows), size), np.uint8)
        # Not memory-mapped: the mapped pages, one for every row, would count as memory of the process.
        with (self.folder / "miniatures").open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * size)
                file.readinto(pixels[place])
        return pixels.reshape(-1, MINIATURE_SIDE, MINIATURE_SIDE, 3)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.fromfile(path, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


def in_order(hashes: NDArray[np.uint64]) -> Iterator[NDArray[np.intp]]:
    """The positions of hashes in the order of the hashes, in parts; equal ones are in one part, in their own order.

    A part has the hashes with one first byte, so that the memory for sorting is a 256th of what all would take.

    Args:
        hashes: Hashes as big-endian integers, [hashes, 4].
    """
    first_bytes = hashes.view(np.uint8)[:, 0].copy()
    for first_byte in range(256):
        places = np.flatnonzero(first_bytes == first_byte)
        yield places[np.lexsort(hashes[places].T[::-1])]


def numbered(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number equal hashes.

    Args:
        hashes: Hashes as big-endian integers, [hashes, 4].

    Returns:
        The first position of each distinct hash, in the order of the hashes; and the number of each hash.
    """
    firsts, count = [], 0
    numbers = np.empty(len(hashes), np.int32)
    for places in in_order(hashes):
        ordered = hashes[places]
        is_new = np.ones(len(places), bool)
        is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        numbers[places] = count - 1 + np.cumsum(is_new)
        firsts.append(places[is_new].astype(np.int32))
        count += len(firsts[-1])
    return np.concatenate(firsts), numbers


def marked(numbers: NDArray[np.integer[Any]], count: int) -> NDArray[np.bool_]:
    """Whether each number below a count is among some numbers."""
    is_marked = np.zeros(count, bool)
    is_marked[numbers] = True
    return is_marked
