"""Reports share one design, escape all values, and are written atomically."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from minicpmv_finetune.reports.pages import write_page

TEMPLATE = """{% extends "pages.html" %}
{% block title %}{{ title }}{% endblock %}
{% block page %}<p>{{ title }}</p>{% endblock %}
"""


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "report.html").write_text(TEMPLATE)
    (folder / "report.css").write_text("p { color: var(--good); }")
    return folder


def test_a_page_escapes_values_and_contains_both_style_sheets(step: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", step, {"title": "<script>alert(1)</script>"})
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 2
    assert page.index("--good: #0c9270") < page.index("p { color: var(--good); }")


def test_half_of_a_surrogate_pair_is_replaced(step: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", step, {"title": "odd \ud800 name"})
    assert "<p>odd ? name</p>" in (tmp_path / "page.html").read_text()


def test_a_missing_value_is_an_error_and_leaves_no_page(step: Path, tmp_path: Path) -> None:
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "page.html", step, {})
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "beginning"),
    [("short", None), ("x" * 60, None), ("x" * 61, "x" * 40), ("1\n2", None), ("1\n2\n3\n4", "1\n2")],
)
def test_of_a_long_text_the_beginning_is_shown(step: Path, tmp_path: Path, text: str, beginning: str | None) -> None:
    (step / "report.html").write_text('{% from "texts.html" import folded %}{{ folded(text, 60) }}{{ style[:0] }}')
    write_page(tmp_path / "page.html", step, {"text": text})
    page = (tmp_path / "page.html").read_text()
    assert f'<span dir="auto">{text}</span>' in page if beginning is None else f">{beginning} …</span>" in page
    assert text in page
