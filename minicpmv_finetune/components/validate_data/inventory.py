"""What is remembered of every accepted sample while the samples themselves pass by: a few bytes each.

Whole samples go to a file as they come, so memory hardly grows with their number: 32 bytes a sample and 52 an image,
100,000 of each in 9 MB. The 16 × 16 grey levels by which copies are found wait in a file too.
"""

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.data.checking import GRAY_SIDE, Accepted

_SHOWN = np.dtype([("sample", "<u4"), ("sha256", "V32"), ("address", "<u8"), ("width", "<u4"), ("height", "<u4")])
_SHOWN_ROW = struct.Struct("<I32s8sII")
_DIGEST = 32


@dataclass
class Inventory:
    """All accepted samples in the order in which they were accepted.

    Attributes:
        lines: file of the samples, a line each.
        grays: file of each shown image's grey levels.
        notes: number of samples by code.
        turns: number of samples by their number of turns.
        images: number of samples by their number of images.
    """

    lines: Path
    grays: Path
    notes: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    _digests: bytearray = field(default_factory=bytearray)
    _shown: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> "Inventory":
        self._lines_file = self.lines.open("w", encoding="utf-8")
        self._grays_file = self.grays.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines_file.close()
        self._grays_file.close()

    def __len__(self) -> int:
        return len(self._digests) // _DIGEST

    def add(self, accepted: Accepted) -> None:
        """Remember a sample."""
        for look in accepted.looks:
            image = look.image
            address = hashlib.blake2b(image.uri.encode(errors="replace"), digest_size=8).digest()
            self._shown += _SHOWN_ROW.pack(len(self), bytes.fromhex(image.sha256), address, image.width, image.height)
            self._grays_file.write(look.gray)
        self._digests += accepted.digest
        self._lines_file.write(f"{accepted.line}\n")
        self.notes.update(accepted.notes)
        self.turns[accepted.turns] += 1
        self.images[len(accepted.looks)] += 1

    def digests(self) -> NDArray[np.void]:
        """The contents' hashes, one of 32 bytes for each sample."""
        return np.frombuffer(self._digests, dtype=f"V{_DIGEST}")

    def shown(self) -> NDArray[np.void]:
        """A record for each image of each sample: `sample`, `sha256`, `address` (hashed), `width` and `height`."""
        return np.frombuffer(self._shown, dtype=_SHOWN)

    def read_grays(self, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Grey levels of some of the shown images, [rows, 16, 16]."""
        size = GRAY_SIDE * GRAY_SIDE
        grays = np.empty((len(rows), size), np.uint8)
        # Not mapped: a page of the file for every row would count as memory.
        with self.grays.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * size)
                file.readinto(grays[place])
        return grays.reshape(-1, GRAY_SIDE, GRAY_SIDE)


def numbered(values: NDArray[np.void]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Number equal values of 32 bytes.

    Returns:
        For each different value, in their order, the first place where it stands; and for each value its number.
    """
    # As big-endian integers: numpy can neither sort raw bytes nor keep their trailing zeros as text.
    words = np.ascontiguousarray(values).view(">u8").reshape(-1, 4)
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    is_new = np.ones(len(ordered), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(ordered), np.intp)
    numbers[order] = np.cumsum(is_new) - 1
    # lexsort is stable, so the first of equal values in this order is the first in the data.
    return order[is_new], numbers
