"""Samples that share images, directly or through others, are held out together."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from minicpmv_finetune.components.validate_data.holdout import hold_out
from minicpmv_finetune.components.validate_data.inventory import Inventory
from minicpmv_finetune.data.checking import AcceptedSample, InspectedImage
from minicpmv_finetune.data.samples import ImageRef


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def inventory_of(folder: Path, samples: list[list[int]]) -> Inventory:
    """Samples with the images of some numbers."""
    with Inventory(folder) as inventory:
        for number, images in enumerate(samples):
            inspected = tuple(
                InspectedImage(ImageRef(uri=f"{image}", sha256=digest(f"{image}").hex(), width=1, height=1), b"", ())
                for image in images
            )
            inventory.add(AcceptedSample("{}", digest(f"sample {number}"), 2, inspected, frozenset()))
    return inventory


def expected(samples: list[list[int]], fraction: float, seed: int) -> list[bool]:
    """What is held out, a group at a time."""
    groups: list[tuple[set[int], list[int]]] = []  # images and samples
    for number, images in enumerate(samples):
        shared = [group for group in groups if group[0] & set(images)]
        groups = [group for group in groups if group not in shared]
        groups.append(
            (set(images).union(*(group[0] for group in shared)), [number, *(n for _, ns in shared for n in ns)])
        )
    held_out = [False] * len(samples)
    for shown, members in groups:
        key = min(map(digest, map(str, shown))) if shown else digest(f"sample {members[0]}")
        drawn = int.from_bytes(hashlib.sha256(f"{seed}:{key.hex()}".encode()).digest()[:8]) / 2**64
        for member in members:
            held_out[member] = drawn < fraction and len(members) <= len(samples) / 2
    return held_out


def random_samples(seed: int) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    return [chance.integers(0, 400, chance.integers(0, 4)).tolist() for _ in range(200)]


SAMPLES: dict[str, list[list[int]]] = {
    "random": random_samples(0),
    "one image each": [[number % 70] for number in range(100)],
    "no images": [[] for _ in range(100)],
    "chains": [[number, number + 1] for number in range(300) if number % 40],
    "one chain and others": [
        *([number, number + 1] for number in range(100)),
        *([number] for number in range(200, 350)),
    ],
    "a star and others": [*([0, number] for number in range(1, 60)), *([number] for number in range(100, 180))],
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
def test_a_group_is_held_out_whole_by_its_smallest_image(tmp_path: Path, samples: list[list[int]]) -> None:
    inventory = inventory_of(tmp_path, samples)
    for seed in range(5):
        assert hold_out(inventory, 0.3, seed).tolist() == expected(samples, 0.3, seed)
