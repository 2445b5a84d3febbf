"""Copies of images are found, different images are not, and the time does not grow with the number of pairs."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance
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


def heart(color: str, side: int = 72) -> Image.Image:
    """An emoji of a heart on white."""
    large = Image.new("RGB", (400, 400), "white")
    draw = ImageDraw.Draw(large)
    for left in (20, 200):
        draw.ellipse((left, 50, left + 180, 230), fill=color)
    draw.polygon([(28, 170), (372, 170), (200, 375)], fill=color)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def flag(colors: str, *, upright: bool) -> Image.Image:
    """A flag of stripes."""
    names = colors.split()
    image = Image.new("RGB", (300, 200))
    for place, color in enumerate(names):
        low, high = place / len(names), (place + 1) / len(names)
        stripe = (300 * low, 0, 300 * high, 200) if upright else (0, 200 * low, 300, 200 * high)
        ImageDraw.Draw(image).rectangle(stripe, fill=color)
    return image


HEARTS = {
    name: heart(color)
    for name, color in {
        "red": "#dd2e44",
        "orange": "#f4900c",
        "yellow": "#fdcb58",
        "green": "#78b159",
        "blue": "#5dadec",
        "purple": "#aa8dd8",
        "brown": "#c1694f",
        "black": "#31373d",
        "white": "#e6e7e8",
        "pink": "#f4abba",
    }.items()
}
FLAGS = {
    "France": flag("#0055a4 #ffffff #ef4135", upright=True),
    "Italy": flag("#009246 #ffffff #ce2b37", upright=True),
    "Ireland": flag("#169b62 #ffffff #ff883e", upright=True),
    "Nigeria": flag("#008751 #ffffff #008751", upright=True),
    "Peru": flag("#d91023 #ffffff #d91023", upright=True),
    "Belgium": flag("#000000 #fae042 #ed2939", upright=True),
    "Romania": flag("#002b7f #fcd116 #ce1126", upright=True),
    "Russia": flag("#ffffff #0039a6 #d52b1e", upright=False),
    "Netherlands": flag("#ae1c28 #ffffff #21468b", upright=False),
    "Luxembourg": flag("#ed2939 #ffffff #00a1de", upright=False),
    "Hungary": flag("#cd2a3e #ffffff #436f4d", upright=False),
    "Bulgaria": flag("#ffffff #00966e #d62612", upright=False),
    "Germany": flag("#000000 #dd0000 #ffce00", upright=False),
    "Lithuania": flag("#fdb913 #006a44 #c1272d", upright=False),
}


def recompressed(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=50))).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((round(width * 0.01), round(height * 0.01), width, height))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed again": recompressed,
    "smaller": lambda image: image.resize((image.width * 2 // 3, image.height * 2 // 3)),
    "larger": lambda image: image.resize((image.width * 2, image.height * 2)),
    "cropped": cropped,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "images",
    [HEARTS, FLAGS, {str(seed): scene(seed) for seed in range(10)}],
    ids=["hearts", "flags", "scenes"],
)
def test_images_of_other_colors_differ_and_copies_do_not(
    tmp_path: Path, images: dict[str, Image.Image], copy: Callable[[Image.Image], Image.Image]
) -> None:
    everything = [*images.values(), *map(copy, images.values())]
    pixels = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BOX)) for image in everything])
    groups, counts = find_in(pixels, tmp_path)
    assert {group.rows for group in groups} == {(place, place + len(images)) for place in range(len(images))}
    assert counts["near_equal_pictures"] == len(everything)


def test_only_a_heart_of_the_same_color_leaks(tmp_path: Path) -> None:
    train = {f"{name}.png": encoded(image) for name, image in HEARTS.items() if name != "blue"}
    evaluation = {"blue.png": encoded(HEARTS["blue"]), "red.jpg": encoded(HEARTS["red"], "JPEG", quality=80)}
    info, repetitions = validate(tmp_path, train, evaluation)
    assert info.noted == {"near_equal_pictures": 2, "leaked_near": 1}
    assert [places(repetition) for repetition in repetitions] == [[("train", "red.png"), ("eval", "red.jpg")]]


def find_in(pixels: NDArray[np.uint8], folder: Path) -> tuple[list[Group], Counter[str]]:
    """Find repeated images among images of which only 16 × 16 pixels are known, in gray or in RGB."""
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    with Inventory(folder) as inventory:
        for number, miniature in enumerate(pixels):
            image = ImageRef(uri=str(number), sha256=f"{number:064x}", width=16, height=16)
            inspected = InspectedImage(image, miniature.tobytes(), ())
            inventory.add(AcceptedSample("{}", number.to_bytes(32), 2, (inspected,), frozenset()))
    return find_repeated(inventory, np.zeros(len(pixels), bool))


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


def test_images_that_resemble_too_many_others_are_counted(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    row, column = np.indices((8, 8))
    base = 20 + 28 * ((5 * row + 3 * column) % 8)
    base[0] = 128  # so that only the hashes of the first row differ
    alike = (base.repeat(2, axis=0).repeat(2, axis=1) + chance.integers(-15, 16, (100, 16, 16))).astype(np.uint8)
    groups, counts = find_in(np.concatenate([alike, alike[:1] + 1, alike[5:6] + 1]), tmp_path)
    assert {group.rows for group in groups} == {(0, 100), (5, 101)}
    assert 0 < counts["partly_compared"] < 102


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
