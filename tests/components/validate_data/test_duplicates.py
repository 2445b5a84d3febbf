"""Copies of images are found, different images are not, and the time does not grow with the number of pairs."""

import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from minicpmv_finetune.components.validate_data.duplicates import Group, Repetition, find_repeated
from minicpmv_finetune.components.validate_data.inventory import Inventory
from minicpmv_finetune.components.validate_data.report import data_warnings
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.checking import AcceptedSample, InspectedImage
from minicpmv_finetune.data.samples import DatasetInfo, ImageRef


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """An image with soft shapes like a photograph, different for each seed."""
    noise = np.random.default_rng(seed).normal(size=(size[1], size[0], 3))
    smooth = gaussian_filter(noise, (size[1] / 8, size[0] / 8, 0))
    return Image.fromarray(((smooth / np.abs(smooth).max() + 1) * 127).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def validate(
    folder: Path, train: dict[str, bytes], evaluation: dict[str, bytes]
) -> tuple[DatasetInfo, list[Repetition]]:
    """Validate a sample for each image."""
    uris = []
    for split, images in (("train", train), ("eval", evaluation)):
        samples = []
        for name, content in images.items():
            (folder / name).write_bytes(content)
            turns = [{"role": "user", "content": f"<image>\n{name}?"}, {"role": "assistant", "content": "Yes."}]
            samples.append({"id": f"{split}-{name}", "image": name, "conversations": turns})
        path = folder / f"{split}.json"
        path.write_text(json.dumps(samples))
        uris.append(str(path))
    info = validate_data(uris[0], uris[1], folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    lines = (folder / "dataset" / "duplicates.jsonl").read_text().splitlines()
    return info, [Repetition.model_validate_json(line) for line in lines]


def places(repetition: Repetition) -> list[tuple[str, str]]:
    return [(appearance.split, Path(appearance.uri).name) for appearance in repetition.appearances]


def test_equal_and_near_equal_images_are_listed_and_leaks_are_reported(tmp_path: Path) -> None:
    train = {f"{seed}.png": encoded(scene(seed)) for seed in range(40)}
    train["same.png"] = train["1.png"]
    train["again.jpg"] = encoded(scene(2), "JPEG", quality=40)
    evaluation = {
        "fresh.png": encoded(scene(100)),
        "leak.png": train["3.png"],
        "small.jpg": encoded(scene(4).resize((97, 71)), "JPEG", quality=70),
        "bright.png": encoded(ImageEnhance.Brightness(scene(5)).enhance(0.8)),
    }
    info, repetitions = validate(tmp_path, train, evaluation)
    assert {(repetition.kind, repetition.leaks, tuple(places(repetition))) for repetition in repetitions} == {
        ("equal", False, (("train", "1.png"), ("train", "same.png"))),
        ("equal", True, (("train", "3.png"), ("eval", "leak.png"))),
        ("near", False, (("train", "2.png"), ("train", "again.jpg"))),
        ("near", True, (("train", "4.png"), ("eval", "small.jpg"))),
        ("near", True, (("train", "5.png"), ("eval", "bright.png"))),
    }
    assert [repetition.leaks for repetition in repetitions] == [True] * 3 + [False] * 2
    assert info.noted == {"equal_pictures": 2, "near_equal_pictures": 6, "leaked_equal": 1, "leaked_near": 2}
    assert [warning.split(" evaluation")[0] for warning in data_warnings(info)] == ["1 of 4", "2 of 4"]


def test_an_image_with_several_questions_is_not_a_duplicate(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(scene(1)))
    turns = [{"role": "user", "content": "<image>\nA?"}, {"role": "assistant", "content": "Yes."}]
    samples = [{"image": "a.png", "conversations": turns}] * 2
    (tmp_path / "train.json").write_text(json.dumps(samples))
    info = validate_data(
        str(tmp_path / "train.json"),
        "",
        tmp_path / "set",
        tmp_path / "rejects.jsonl",
        ValidationSettings(eval_fraction=0),
    )
    assert info.noted == {"duplicate_samples": 1}
    assert (tmp_path / "set" / "duplicates.jsonl").read_text() == ""


def test_blank_images_are_not_near_equal(tmp_path: Path) -> None:
    train = {f"{level}.png": encoded(Image.new("RGB", (64, 64), (level, level, level))) for level in range(250, 256)}
    info, _ = validate(tmp_path, train, {"page.png": encoded(scene(1))})
    assert info.noted == {}


def find_in(grays: NDArray[np.uint8], folder: Path) -> tuple[list[Group], Counter[str]]:
    """Find repeated images among images of which only the gray levels are known."""
    with Inventory(folder / "samples.jsonl", folder / "grays") as inventory:
        for number, gray in enumerate(grays):
            image = ImageRef(uri=str(number), sha256=f"{number:064x}", width=16, height=16)
            inspected = InspectedImage(image, gray.tobytes(), ())
            inventory.add(AcceptedSample("{}", number.to_bytes(32), 2, (inspected,), frozenset()))
    return find_repeated(inventory, np.zeros(len(grays), bool))


def test_the_hash_finds_every_pair_that_comparing_all_pairs_finds(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    originals = chance.integers(0, 256, (300, 16, 16)).astype(np.float64)
    copies = originals + chance.normal(0, 2, originals.shape)
    grays = np.concatenate([originals, copies]).clip(0, 255).astype(np.uint8)
    flat = grays.reshape(600, -1) - grays.reshape(600, -1).mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    alike = np.argwhere(np.triu(flat @ flat.T >= 0.99, 1))
    groups, counts = find_in(grays, tmp_path)
    assert {group.rows for group in groups} == {tuple(pair) for pair in alike.tolist()}
    assert counts["near_equal_pictures"] == 600


@pytest.mark.parametrize("kind", ["all different", "all alike"])
def test_time_is_linear_in_images(kind: str, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    base = chance.integers(0, 256, (16, 16))
    seconds = []
    for number in (2_000, 20_000):
        noise = (
            chance.integers(0, 256, (number, 16, 16))
            if kind == "all different"
            else chance.integers(0, 2, (number, 16, 16))
        )
        grays = (noise if kind == "all different" else base.clip(0, 250) + noise).astype(np.uint8)
        (tmp_path / str(number)).mkdir()
        started = time.process_time()
        groups, _ = find_in(grays, tmp_path / str(number))
        seconds.append(time.process_time() - started)
        assert len(groups) == (kind == "all alike")
    assert seconds[1] < 20 * seconds[0] + 1
