"""A few bytes in memory for every accepted sample, while the samples themselves are written to a file.

Memory hardly grows with the number of samples: 32 bytes per sample and 52 per image, 9 MB for 100,000 of each. The
16 × 16 pixels by which copies are found are stored in a file too, 768 bytes per image.
"""

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.data.checking import MINIATURE_SIDE, AcceptedSample

_IMAGE = np.dtype([("sample", "<u4"), ("sha256", "V32"), ("address", "<u8"), ("width", "<u4"), ("height", "<u4")])
_IMAGE_ROW = struct.Struct("<I32s8sII")
_DIGEST = 32
_NAMED_FIELDS = 1000  # names that are counted one by one, so that memory does not grow with the number of names


@dataclass
class Inventory:
    """All accepted samples, in the order in which they were accepted.

    Attributes:
        lines: File of the samples, one per line.
        miniatures: File of the miniature of each image of each sample.
        notes: Number of samples by the code of a noteworthy property.
        turns: Number of samples by their number of turns.
        images: Number of samples by their number of images.
        ignored: Number of samples by the name of a field that has no meaning.
    """

    lines: Path
    miniatures: Path
    notes: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    _digests: bytearray = field(default_factory=bytearray)
    _images: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> "Inventory":
        self._lines_file = self.lines.open("w", encoding="utf-8")
        self._miniatures_file = self.miniatures.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines_file.close()
        self._miniatures_file.close()

    def __len__(self) -> int:
        return len(self._digests) // _DIGEST

    def add(self, accepted: AcceptedSample) -> None:
        """Add a sample."""
        for image in accepted.images:
            ref = image.ref
            address = hashlib.blake2b(ref.uri.encode(errors="replace"), digest_size=8).digest()
            self._images += _IMAGE_ROW.pack(len(self), bytes.fromhex(ref.sha256), address, ref.width, ref.height)
            self._miniatures_file.write(image.miniature)
        self._digests += accepted.digest
        self._lines_file.write(f"{accepted.line}\n")
        self.notes.update(accepted.notes)
        self.turns[accepted.turns] += 1
        self.images[len(accepted.images)] += 1
        for name in accepted.ignored:
            self.ignored[name if name in self.ignored or len(self.ignored) < _NAMED_FIELDS else "…"] += 1

    def digests(self) -> NDArray[np.void]:
        """The hash of each sample's content, 32 bytes each."""
        return np.frombuffer(self._digests, dtype=f"V{_DIGEST}")

    def image_rows(self) -> NDArray[np.void]:
        """A row for each image of each sample: `sample`, `sha256`, `address` (hashed), `width` and `height`."""
        return np.frombuffer(self._images, dtype=_IMAGE)

    def read_miniatures(self, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The images at some rows of `image_rows` in 16 × 16 RGB pixels, [rows, 16, 16, 3]."""
        size = MINIATURE_SIDE * MINIATURE_SIDE * 3
        pixels = np.empty((len(rows), size), np.uint8)
        # Not memory-mapped: the mapped pages, one for every row, would count as memory of the process.
        with self.miniatures.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * size)
                file.readinto(pixels[place])
        return pixels.reshape(-1, MINIATURE_SIDE, MINIATURE_SIDE, 3)


def numbered(values: NDArray[np.void]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Number equal values of 32 bytes.

    Returns:
        The first position of each distinct value, in the order of the values; and the number of each value.
    """
    # As big-endian integers, because numpy cannot sort raw bytes and drops trailing zeros of byte strings.
    words = np.ascontiguousarray(values).view(">u8").reshape(-1, 4)
    order = np.lexsort(words.T[::-1])
    ordered = words[order]
    is_new = np.ones(len(ordered), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(ordered), np.intp)
    numbers[order] = np.cumsum(is_new) - 1
    # lexsort is stable, so the first of several equal values in this order is also the first in the data.
    return order[is_new], numbers
