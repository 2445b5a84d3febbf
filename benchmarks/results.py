"""Rows of results, whose targets are the goals; build/bench/speed.jsonl has each name once, as measured last."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench/speed.jsonl")


def make_result(name: str, ratio: float, target: float | None, detail: str, at_most: bool = False) -> dict[str, Any]:
    """A row of the results: the ratio should be at least, or at most, the target; without one it counts as reached."""
    holds = target is None or (ratio <= target if at_most else ratio >= target)
    return {"name": name, "ratio": round(ratio, 3), "target": target, "holds": holds, "detail": detail}


def save_results(rows: Sequence[dict[str, Any]]) -> None:
    """Write rows; rows of other names stay in the file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    names = {row["name"] for row in rows}
    everything = [row for row in kept if row["name"] not in names] + [*rows]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in everything))
