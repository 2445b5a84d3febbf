"""Charts drawn from the tables of vega-datasets: bars, lines and points, with questions that have exact answers.

A chart shows a few successive entries of a column. Every fifth column is held out, and every fifth row of the tables
for points. Names are scored by exact match, since relaxed accuracy would accept 1985 for 1990.
"""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .drawing import VL_CONVERT, drawing_library
from .registries import Package
from .task import READING, Asked, AskedImage, Split, Task

CHARTS: Mapping[Split, int] = {"train": 1600, "test": 400}
_SEEDS: Mapping[Split, int] = {"train": 1, "test": 2}
_LOOK: Mapping[str, Any] = {
    "width": 224,
    "height": 112,
    "padding": 2,
    "autosize": {"type": "fit", "contains": "padding"},
    "config": {"axis": {"labelFontSize": 8, "titleFontSize": 8, "labelLimit": 80, "tickCount": 4}},
}
"""A small image with letters that are just legible: a tiny model sees 112 × 112 pixels at once."""
_VEGA_LITE = "5.20"
_POINTS = (
    ("cars", "Horsepower", "Miles_per_Gallon"),
    ("cars", "Weight_in_lbs", "Acceleration"),
    ("iris", "sepalLength", "petalWidth"),
)


@dataclass(frozen=True)
class Column:
    """A column of a table, with the labels of its rows."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]


def images(split: Split, packages: Mapping[str, Path]) -> Iterator[AskedImage]:
    """Charts of random parts of the tables; the seed is fixed."""
    folder = packages["data"] / "vega_datasets" / "_data"
    draw = drawing_library(packages).vegalite_to_png
    chance = random.Random(_SEEDS[split])  # noqa: S311
    columns = [column for number, column in enumerate(_columns(folder)) if (number % 5 == 4) == (split == "test")]
    for number in range(CHARTS[split]):
        kind = ("bar", "line", "point")[number % 3]
        spec, asked = _points(folder, split, chance) if kind == "point" else _series(columns, kind, chance)
        yield AskedImage(draw(spec, vl_version=_VEGA_LITE), asked)


def _series(columns: Sequence[Column], kind: str, chance: random.Random) -> tuple[dict[str, Any], tuple[Asked, ...]]:
    """A chart of bars or of a line, in which one entry is the highest."""
    while True:
        column = chance.choice(columns)
        length = chance.randint(4, 7)
        start = chance.randrange(len(column.values) - length + 1)
        values = dict(zip(column.labels[start : start + length], column.values[start : start + length], strict=True))
        top, second = sorted(values.values(), reverse=True)[:2]
        if len(values) == length and top > second * 1.02 and min(values.values()) > 0:
            break
    rows = [{"label": label, "value": value} for label, value in values.items()]
    mark: Any = "bar" if kind == "bar" else {"type": "line", "point": True}
    spec = {
        "data": {"values": rows},
        "mark": mark,
        **_LOOK,
        "encoding": {
            "x": {"field": "label", "type": "ordinal", "sort": None, "title": None},
            "y": {"field": "value", "type": "quantitative", "title": column.title},
        },
    }
    label = chance.choice(list(values))
    tag = "bars" if kind == "bar" else "lines"
    return spec, (
        Asked("Which entry has the highest value?", max(values, key=values.__getitem__), tag),
        Asked(f"What is the value of {label}?", _number(values[label]), tag, "relaxed_accuracy"),
        Asked("What does the chart show? Answer in JSON.", json.dumps(values), tag, "json_fields"),
    )


def _points(folder: Path, split: Split, chance: random.Random) -> tuple[dict[str, Any], tuple[Asked, ...]]:
    """A chart of points, some rows of a table."""
    table, across, up = chance.choice(_POINTS)
    rows = [
        {across: row[across], up: row[up]}
        for number, row in enumerate(json.loads((folder / f"{table}.json").read_text()))
        if (number % 5 == 4) == (split == "test") and row[across] is not None and row[up] is not None
    ]
    rows = chance.sample(rows, chance.randint(3, 12))
    axis = {"type": "quantitative", "scale": {"zero": False}}
    spec = {
        "data": {"values": rows},
        "mark": "point",
        **_LOOK,
        "encoding": {"x": {"field": across, **axis}, "y": {"field": up, **axis}},
    }
    highest = max(row[up] for row in rows)
    return spec, (
        Asked("How many points are there?", str(len(rows)), "points", "relaxed_accuracy"),
        Asked(f"What is the highest {up}?", _number(highest), "points", "relaxed_accuracy"),
    )


def _columns(folder: Path) -> list[Column]:
    """All columns for bars and lines, in a fixed order."""
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in _rows(folder / "stocks.csv"):
        month, _, year = row["date"].split()
        found[f"price of {row['symbol']}"].append((f"{month} {year}", float(row["price"])))
    for row in _rows(folder / "us-employment.csv"):
        for name, value in row.items():
            if name not in ("month", "nonfarm_change"):
                found[name.replace("_", " ")].append((row["month"][:7], float(value)))
    for row in _rows(folder / "iowa-electricity.csv"):
        found[row["source"]].append((row["year"][:4], float(row["net_generation"])))
    for row in json.loads((folder / "barley.json").read_text()):
        found[f"{row['site']} {row['year']}"].append((row["variety"], row["yield"]))
    weather: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "seattle-weather.csv"):
        for name in ("precipitation", "temp_max", "temp_min", "wind"):
            weather[name][row["date"][:7].replace("/", "-")].append(float(row[name]))
    for name, months in weather.items():
        found[name] = [(month, sum(days) / len(days)) for month, days in months.items()]
    return [
        Column(title, [label for label, _ in rows], [float(f"{value:.3g}") for _, value in rows])
        for title, rows in found.items()
        if len(rows) >= 7
    ]


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0f}"


TASK = Task(
    name="charts",
    title="charts of vega-datasets, bars, lines and points",
    packages={
        "data": Package(
            "PyPI",
            "vega-datasets",
            "MIT",
            "0.9.0",
            ("3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",),
        ),
        "drawing": VL_CONVERT,
    },
    images=images,
    inputs={
        **READING,
        "evaluation_options": {"max_new_tokens": 96, "batch_size": 64},
    },
    fine=True,
)
