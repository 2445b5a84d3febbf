"""The page has the rows that the benchmark of growth kept."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_have_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from growth import BEGIN, END, KEPT, PAGE, read_rows, write_tables

    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert write_tables(read_rows(ROOT / KEPT)) in page[page.index(BEGIN) : page.index(END)]
