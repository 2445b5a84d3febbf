import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.shards.format import ShardReader
from tests.components.layout import layout_faults

HOSTILE = "</p><script>document.title='taken'</script>{{ 7*7 }}"


def sample(number: int, text: str, image: str | None) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {number}."}]
    return {"id": f"sample-{number}{HOSTILE}", "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def report(tmp_path: Path, tiny_46: Path) -> tuple[str, Path]:
    """The page, and the folder of its shards."""
    random = np.random.default_rng(0)
    for name, (width, height) in {"small.png": (112, 112), "large.png": (500, 300)}.items():
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    samples = [
        sample(0, "<image>\nWhich?", "small.png"),
        sample(1, f"<image>\nWhich? {HOSTILE}", "large.png"),
        sample(2, "Which?", None),
    ]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    (tmp_path / "eval.json").write_text(json.dumps(samples[:1]))
    files = str(tmp_path / "train.json"), str(tmp_path / "eval.json")
    validate_data(*files, tmp_path / "dataset", tmp_path / "rejects.jsonl", ValidationSettings())
    preprocess(
        tmp_path / "dataset",
        str(tiny_46),
        tmp_path / "shards",
        tmp_path / "preprocess-rejects.jsonl",
        PreprocessSettings(),
        num_workers=1,
        report=tmp_path / "report.html",
    )
    return (tmp_path / "report.html").read_text(), tmp_path / "shards"


def test_each_slice_has_the_positions_of_its_tokens(report: tuple[str, Path], tiny_46: Path) -> None:
    page, shards = report
    image_token = json.loads((tiny_46 / "config.json").read_text())["image_token_id"]
    positions = [(int(first), int(last)) for first, last in re.findall(r"<figcaption>(\d+)–(\d+)<small>", page)]
    expected = []
    slices = 0
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        for row in ShardReader(shards, split):
            ids = list(row.input_ids)
            slices += len(row.slices)
            if row.slices:
                runs = re.finditer("1+", "".join(str(int(token == image_token)) for token in ids))
                expected += [(run.start(), run.end() - 1) for run in runs]
    assert positions == expected
    assert len(positions) == slices
    assert slices == page.count(' alt="Slice ')


def test_the_histograms_count_every_sample(report: tuple[str, Path]) -> None:
    page, _ = report
    for unit in ("tokens", "slices"):
        counts = re.findall(rf'title="[\d,–]+ {unit}: (\d+) samples"', page)
        assert sum(map(int, counts)) == 4


def test_slices_have_a_grid_if_each_token_covers_one_area(report: tuple[str, Path]) -> None:
    page, _ = report
    # 112 pixels are 8 patches of 14 pixels; a square of 4 × 4 patches becomes one token.
    assert "background-size: 50.0000% 50.0000%" in page


def test_text_from_the_data_is_escaped(report: tuple[str, Path]) -> None:
    page, _ = report
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_page_can_be_read_in_every_window(report: tuple[str, Path], page: Page, tmp_path: Path) -> None:
    page.goto((tmp_path / "report.html").as_uri())
    assert layout_faults(page) == []
