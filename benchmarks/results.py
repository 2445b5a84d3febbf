"""Results of the speed benchmarks, one JSON object per line: each name once, with its latest measurement."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench/speed.jsonl")


def make_result(name: str, ratio: float, target: float, detail: str) -> dict[str, Any]:
    """A row of the results; `ratio` should be at least `target`."""
    return {"name": name, "ratio": round(ratio, 3), "target": target, "holds": ratio >= target, "detail": detail}


def save_results(rows: Sequence[dict[str, Any]]) -> None:
    """Write rows; rows of other names stay in the file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    names = {row["name"] for row in rows}
    everything = [row for row in kept if row["name"] not in names] + [*rows]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in everything))
