"""The report, opened in a browser."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page

from minicpmv_finetune.components.validate_data.report import markdown
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import DatasetInfo
from tests.components.layout import layout_faults

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"`{{ 7*7 }}"


def sample(name: str, image: str | None, question: str = "What?", answer: str = "That.") -> dict[str, Any]:
    mark = "<image>\n" if image else ""
    turns = [{"role": "user", "content": f"{mark}{question}"}, {"role": "assistant", "content": answer}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def open_report(page: Page, folder: Path, train: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> DatasetInfo:
    files = folder / "train.json", folder / "eval.json"
    for path, samples in zip(files, (train, evaluation), strict=True):
        path.write_text(json.dumps(samples))
    report = folder / "report.html"
    settings = ValidationSettings(max_reject_ratio=1.0)
    info = validate_data(str(files[0]), str(files[1]), folder / "dataset", folder / "rejects.jsonl", settings, report)
    page.goto(report.as_uri())
    return info


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    file = io.BytesIO()
    noise = Image.frombytes("L", (8, 8), random.Random(seed).randbytes(64))
    noise.resize(size, Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG")
    path.write_bytes(file.getvalue())


def test_the_page_shows_the_findings(page: Page, tmp_path: Path) -> None:
    for seed, size in enumerate([(1344, 448), (200, 100), (448, 896)]):
        write_image(tmp_path / f"{seed}.png", size, seed)
    train = [*(sample(f"s{seed}", f"{seed}.png") for seed in range(3)), sample("words", None), sample("no", "no.png")]
    info = open_report(page, tmp_path, train, [sample("leak", "1.png")])
    assert page.locator("h1").inner_text().replace("\n", " ") == "5 samples can be trained on, 1 cannot"
    assert page.locator(".legend li").all_text_contents() == ["4 to train on", "1 to evaluate", "1 rejected"]
    assert (
        "1 of 1 evaluation samples show an image that is in the training data too"
        in page.locator(".warnings").inner_text()
    )
    (row,) = page.locator("#rejected tbody tr").all_inner_texts()
    assert row.startswith("image_missing\t1\t")
    assert "train.json, sample 4 no" in row
    sizes = page.locator("img").evaluate_all(
        "images => Promise.all(images.map((image) => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(sizes) == 4 + 2
    assert all(sizes)
    assert sorted(page.locator(".card figcaption").all_inner_texts()) == [
        "1344 × 448, 1 × 3 slices",
        *["200 × 100"] * 4,
        "448 × 896, 2 × 1 slices",
    ]
    # There is a line at each cut, and no line over an image that is not cut.
    assert sorted(page.locator("path.over").evaluate_all("lines => lines.map((line) => line.getAttribute('d'))")) == [
        "M0 1H1",
        "M1 0V1M2 0V1",
    ]
    box, grid = (page.locator(kind).first.bounding_box() for kind in (".frame:has(svg) img", ".frame svg"))
    assert box == grid, "the grid covers its image"
    slices = page.get_by_role("img", name="Slices of an image")
    assert (slices.get_attribute("aria-label") or "").startswith("Slices of an image: 1: 2. 2: 0. 3: 1. 4: 1.")
    assert info.fingerprint in page.locator("footer").inner_text()
    (duplicate,) = page.locator("#duplicates .card").all_inner_texts()
    assert "in training and evaluation" in duplicate


def test_texts_from_the_data_are_escaped(page: Page, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    write_image(tmp_path / name, (64, 64))
    bad = {**sample(HOSTILE, None), "image": HOSTILE}
    open_report(page, tmp_path, [sample(HOSTILE, name, HOSTILE, HOSTILE), bad], [sample(HOSTILE, name)])
    assert page.title() == "Training data · validation"
    assert page.locator("script, main img[src=x], [onerror]").count() == 0
    assert HOSTILE in page.locator("#gallery .assistant").all_inner_texts()


LONG = "a_long_name_without_a_blank_" * 7
SETS: dict[str, tuple[list[str], str, str]] = {
    "long names": ([f"{LONG}{number}.png" for number in range(3)], "W" * 900, "漢字" * 400),
    "right to left": (["صورة.png"], "س" * 90, "ج " * 300),
    "no image": ([], "What?", "That."),
}


@pytest.mark.parametrize(("names", "question", "answer"), SETS.values(), ids=SETS)
def test_the_page_can_be_read_in_every_window(
    page: Page, tmp_path: Path, names: list[str], question: str, answer: str
) -> None:
    for seed, name in enumerate(names):
        write_image(tmp_path / name, (30, 900) if seed else (900, 30), seed)
    train = [sample(f"{LONG}{seed}", name, question, answer) for seed, name in enumerate(names)]
    train += [sample("words", None, question, answer), sample(LONG * 3, f"{LONG}missing.png")]
    info = open_report(page, tmp_path, train, [sample("e", name) for name in names[:1]] or [sample("e", None)])
    assert info.rejected == {"image_missing": 1}
    assert layout_faults(page) == []


def test_the_page_is_small_and_its_selection_depends_only_on_the_contents(page: Page, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (900, 900))
    samples = [sample(str(number), "a.png", f"Question {number}?") for number in range(200)]
    chosen = []
    for order in (samples, samples[::-1]):
        open_report(page, tmp_path, order, [sample("words", None)])
        assert (tmp_path / "report.html").stat().st_size < 10e6
        chosen.append(set(page.locator("#gallery .id").all_inner_texts()))
    assert len(chosen[0]) == 60
    assert chosen[0] == chosen[1]


def test_the_table_contains_counts_and_warnings() -> None:
    info = DatasetInfo(
        fingerprint="f" * 64, rows={"train": 3000, "eval": 20}, rejected={"roles": 2}, noted={"leaked_near": 4}
    )
    text = markdown(info)
    assert "| train | 3,000 |" in text
    assert "| `roles` | 2 |" in text
    assert (
        "**Warning:** 4 of 20 evaluation samples show an image that looks the same as one in the training data" in text
    )
