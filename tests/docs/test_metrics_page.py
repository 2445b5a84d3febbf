"""The page of metrics: each metric is defined and has examples, and each score in it is what the code computes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from minicpmv_finetune.components.evaluate.comparison import estimate
from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import read_samples
from tests.docs.pages import ROOT, blocks

PAGE = (ROOT / "docs" / "metrics.md").read_text()


def rows(heading: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the table below a heading, code spans without their marks."""
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip().strip("`") for cell in line.strip("|").split(" |")]


EXAMPLES = [cells for cells in rows("Examples") if cells[0] in METRICS]


@pytest.mark.parametrize("cells", EXAMPLES, ids=lambda cells: f"{cells[0]}-{cells[2]}")
def test_examples_have_the_score_that_the_page_says(cells: list[str]) -> None:
    name, accepted, answer, score = cells[:4]
    expected = accepted.split("; ")
    assert METRICS[name].find_problem(expected) is None
    assert round(METRICS[name].score(answer, expected), 3) == float(score)


def test_every_metric_is_defined_and_has_an_example() -> None:
    assert [cells[0] for cells in rows("Definitions") if cells[0] in METRICS] == list(METRICS)
    assert {cells[0] for cells in EXAMPLES} == set(METRICS)
    suggested = " ".join(cells[1] for cells in rows("Which one"))
    assert [name for name in METRICS if not re.search(rf"`?\b{name}\b", suggested)] == []


def test_answers_count_as_right_where_the_page_says() -> None:
    for cells in rows("Definitions"):
        if cells[0] in METRICS:
            assert METRICS[cells[0]].right_at == float(cells[2]), cells[0]


def test_the_example_of_a_sample_is_accepted(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(PAGE) if block.language == "json"]
    sample = json.loads(block.text)
    Image.new("RGB", (40, 30)).save(tmp_path / sample["image"])
    (tmp_path / "train.json").write_text(json.dumps([sample]))
    settings = ValidationSettings(max_reject_ratio=0, eval_fraction=0)
    validate_data(str(tmp_path / "train.json"), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    (read,) = read_samples(tmp_path / "dataset", "train")
    assert (read.metric, list(read.answers), list(read.tags)) == ("anls", sample["answers"], ["totals"])


def test_the_interval_of_ninety_of_a_hundred_is_as_wide_as_the_page_says() -> None:
    interval = estimate([1.0] * 90 + [0.0] * 10, [1.0] * 100)
    assert f"about {interval.low * 100:.0f} to {interval.high * 100:.0f} %" in " ".join(PAGE.split())
