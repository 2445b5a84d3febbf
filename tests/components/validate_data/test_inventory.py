"""Hashes are numbered as a dictionary would number them, and memory hardly grows with the samples."""

import hashlib
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from minicpmv_finetune.components.validate_data.duplicates import find_repeated
from minicpmv_finetune.components.validate_data.holdout import hold_out
from minicpmv_finetune.components.validate_data.inventory import Inventory, in_order, numbered
from minicpmv_finetune.data.checking import AcceptedSample, InspectedImage
from minicpmv_finetune.data.samples import ImageRef


def mixed(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


HASHES: dict[str, list[bytes]] = {
    "different": [mixed(number) for number in range(2000)],
    "many equal ones": [mixed(number % 7) for number in range(500)],
    "equal first words": [bytes(8) + mixed(number % 90)[:24] for number in range(200)],
    "equal but for the last byte": [b"\xff" * 31 + bytes([number * 37 % 256]) for number in range(300)],
    "zeros at the end": [bytes([number % 3]) + bytes(31) for number in range(20)],
    "none": [],
}


@pytest.mark.parametrize("hashes", HASHES.values(), ids=HASHES.keys())
def test_hashes_are_sorted_and_numbered_like_bytes(hashes: list[bytes]) -> None:
    words = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 4)
    assert [int(place) for places in in_order(words) for place in places] == sorted(
        range(len(hashes)), key=lambda place: (hashes[place], place)
    )
    distinct = sorted(set(hashes))
    first, numbers = numbered(words)
    assert first.tolist() == [hashes.index(value) for value in distinct]
    assert numbers.tolist() == [distinct.index(value) for value in hashes]


def peak_memory(work: Callable[[], object]) -> int:
    """The most bytes that Python and numpy have allocated at once while a function runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def filled(folder: Path, count: int) -> tuple[Inventory, int]:
    """An inventory of samples with an image each, all different; and the memory that adding the last half took."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16 * 16 * 3), dtype=np.uint8)
    samples = []
    for number in range(count):
        ref = ImageRef(uri=str(number), sha256=mixed(number).hex(), width=28, height=28)
        image = InspectedImage(ref, pixels[number].tobytes(), ())
        samples.append(AcceptedSample("{}", mixed(-number), 2, (image,), frozenset()))

    def add_last_half() -> None:
        for number in range(count // 2, count):
            inventory.add(samples[number])

    with Inventory(folder) as inventory:
        for number in range(count // 2):
            inventory.add(samples[number])
        return inventory, peak_memory(add_last_half)


def split_and_compare(inventory: Inventory) -> NDArray[np.bool_]:
    is_eval = hold_out(inventory, 0.1, 0)
    find_repeated(inventory, is_eval)
    return is_eval


def test_memory_grows_by_less_than_a_hundred_bytes_a_sample(tmp_path: Path) -> None:
    peaks = {}
    split_and_compare(filled(tmp_path / "imports", 10)[0])
    for count in (5_000, 25_000):
        inventory, while_adding = filled(tmp_path / f"{count}", count)
        assert while_adding < 300_000, "buffers of files take 150,000"
        peaks[count] = peak_memory(partial(split_and_compare, inventory))
    assert peaks[5_000] < 8e6
    assert (peaks[25_000] - peaks[5_000]) / 20_000 < 100
