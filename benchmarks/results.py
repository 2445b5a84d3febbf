"""The speed benchmarks' figures, one JSON object a line: each name once, as it was measured last."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench/speed.jsonl")


def result(name: str, ratio: float, target: float, detail: str) -> dict[str, Any]:
    """A figure that should be at least its target."""
    return {"name": name, "ratio": round(ratio, 3), "target": target, "holds": ratio >= target, "detail": detail}


def keep(rows: Sequence[dict[str, Any]]) -> None:
    """Write figures beside those of other names."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    names = {row["name"] for row in rows}
    everything = [row for row in kept if row["name"] not in names] + [*rows]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in everything))
