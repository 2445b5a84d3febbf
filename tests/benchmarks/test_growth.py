"""The page has the rows that the benchmark of growth kept."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_have_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from growth import BEGIN, END, KEPT, PAGE, read_rows, write_tables

    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert write_tables(read_rows(ROOT / KEPT)) in page[page.index(BEGIN) : page.index(END)]


def test_the_results_have_the_largest_growth_and_ignore_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from growth import compare

    steps = {"validate-data": (100, 110, 5, 40), "preprocess": (600, 800, 10, 60), "whole train": (700, 710, 9, 50)}
    rows = [
        {"step": step, "samples": samples, "peak_mb": memory, "cpu_s": seconds}
        for step, (less, more, short, long) in steps.items()
        for samples, memory, seconds in ((10_000, less, short), (100_000, more, long))
    ]
    few = [{"step": "validate-data", "samples": 200, "peak_mb": 10, "cpu_s": 0.1}]
    results = [(result["name"], result["ratio"], result["holds"]) for result in compare([*few, *rows])]
    assert results == [("growth_memory", 1.333, False), ("growth_time_for_10x", 8.0, True)]
    assert compare(few) == []
