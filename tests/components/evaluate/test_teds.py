"""TEDS against its reference implementation, and on answers that are no proper table.

`teds_reference.json` has tables and the scores of the published code: `TEDS().evaluate` of src/metric.py in the
repository ibm-aur-nlp/PubTabNet, commit 8ffde9024bd331f5a61c3c549fdf30dd3c3e43a5, with apted 1.0.3, lxml 6.1.3 and
distance 0.1.3, each table inside `<html><body>…</body></html>`. The tables are random, from a seed, with spans, `<th>`,
`<thead>`, tags in cells, entities and several scripts; the last four lack tags or more.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune.components.evaluate.metrics import teds

CASES = json.loads(Path(__file__).with_name("teds_reference.json").read_text(encoding="utf-8"))
ONE_CELL = "<table><tr><td>1</td></tr></table>"


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_scores_equal_those_of_the_published_code(case: dict[str, Any]) -> None:
    assert teds(case["answer"], [case["expected"]]) == pytest.approx(case["score"], abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("", 0.0),
        ("There is no table.", 0.0),
        (f"Here it is:\n```html\n{ONE_CELL}\n```", 1.0),
        (f"<!DOCTYPE html><html><body><h1>Table</h1>{ONE_CELL}</body></html>", 1.0),
        (f"{ONE_CELL}<table><tr><td>2</td></tr></table>", 1.0),
        ("<table><tr><td>1", 1.0),
        ("<TABLE><TR><TD>1</TD></TR></TABLE>", 1.0),
        ("<table><tr><td>2</td></tr></table>", 0.5),
        (f'<table><tr><td colspan="{"9" * 5000}">1</td></tr></table>', 1.0),
        ("<table>", 0.0),
        (f"<table><tr><td>{'<b>' * 20_000}", 0.0),
    ],
)
def test_an_answer_of_any_kind_has_a_score(answer: str, score: float) -> None:
    assert teds(answer, [ONE_CELL]) == score
