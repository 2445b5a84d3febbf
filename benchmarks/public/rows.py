"""The rows of the benchmarks on public data, and the table that docs/benchmarks.md has of them."""

import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import replace_part

from minicpmv_finetune.components.evaluate.comparison import estimate
from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.git_commit import commit_of_checkout

from .tasks import TASKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "public.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by benchmarks/on_public_data.py -->", "<!-- end -->"


def blind_answers(train: Path) -> dict[str, str]:
    """The most frequent answer to each question in the training data: what can be said without the image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with train.open(encoding="utf-8") as lines:
        for asked, given in (json.loads(line)["conversations"] for line in lines):
            counts[asked["content"].removeprefix("<image>\n")][given["content"]] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def score_answers(lines: Iterable[Mapping[str, Any]], blind: Mapping[str, str]) -> dict[str, Any]:
    """For each metric: samples, scores of base, blind answers and tuned model with its interval, and those by tag.

    Args:
        lines: Lines of predictions files.
        blind: An answer without the image to each question, as far as there is one.
    """
    by_metric: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        by_metric[line["metric"]].append(line)
    scores = {}
    for metric, found in by_metric.items():
        score = METRICS[metric].score
        for line in found:
            line["scores"]["blind"] = {metric: score(blind.get(line["question"], ""), line["expected"])}
        tuned = estimate(*_scores(found, "tuned"))
        tags = sorted({tag for line in found for tag in line["tags"]})
        scores[metric] = {
            "samples": len(found),
            "base": round(_mean(found, "base"), 4),
            "blind": round(_mean(found, "blind"), 4),
            "tuned": round(tuned.value, 4),
            "low": round(tuned.low, 4),
            "high": round(tuned.high, 4),
            **{f"{model}_by_tag": _by_tag(found, tags, model) for model in ("blind", "tuned")},
        }
    return scores


def current_commit() -> str:
    """The commit that is checked out, with `+` if the code of the package or of the benchmarks differs from it."""
    code = (":/minicpmv_finetune", ":/benchmarks/*.py", ":/benchmarks/public")
    command = ("git", "status", "--porcelain", "--", *code)
    changes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return commit_of_checkout(ROOT / "minicpmv_finetune") + ("+" if changes else "")


def read_rows() -> list[dict[str, Any]]:
    """The rows of the results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def save_row(row: Mapping[str, Any]) -> None:
    """Write a row into the results, in the place of an older one of its task and seed, and the table into the page."""
    kept = [other for other in read_rows() if (other["task"], other["seed"]) != (row["task"], row["seed"])]
    order = list(TASKS)
    rows = sorted([*kept, row], key=lambda one: (order.index(one["task"]), one["seed"]))
    RESULTS.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    replace_part(PAGE, BEGIN, END, f"\n\n{tables(rows)}\n")


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of the page: a line for each metric of a row, and its scores by kind of question."""
    return f"{_results(rows)}\n{_kinds(rows)}"


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = "Data|Trained on|Tested on|Measure|Untrained|Blind|Tuned (95 % interval)|Published|Minutes|GB|Seed|Commit"
    lines = [f"| {columns.replace('|', ' | ')} |", "|---|---:|---:|---|---:|---:|---:|---|---:|---:|---:|---|"]
    for row in rows:
        minutes, gigabytes = row["seconds"]["all"] / 60, row["peak_bytes"] / 1e9
        for metric, score in row["scores"].items():
            cells = (
                TASKS[row["task"]].title,
                f"{row['train questions']:,} × {row['budget']['num_train_epochs']:g}",
                f"{score['samples']:,}",
                f"`{metric}`",
                f"{score['base']:.3f}",
                f"{score['blind']:.3f}",
                f"**{score['tuned']:.3f}** ({score['low']:.3f}–{score['high']:.3f})",
                TASKS[row["task"]].beside,
                f"{minutes:.0f}",
                f"{gigabytes:.1f}",
                str(row["seed"]),
                row["commit"][:7],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| Data | Measure | Tuned (blind), by kind of question |", "|---|---|---|"]
    for row in rows:
        for metric, score in row["scores"].items():
            blind = score["blind_by_tag"]
            kinds = ", ".join(f"{tag} {value:.3f} ({blind[tag]:.3f})" for tag, value in score["tuned_by_tag"].items())
            lines.append(f"| {row['task']} | `{metric}` | {kinds} |")
    return "\n".join(lines) + "\n"


def _by_tag(lines: Sequence[Mapping[str, Any]], tags: Sequence[str], model: str) -> dict[str, float]:
    return {tag: round(_mean([line for line in lines if tag in line["tags"]], model), 4) for tag in tags}


def _mean(lines: Sequence[Mapping[str, Any]], model: str) -> float:
    scores, weights = _scores(lines, model)
    return float(np.average(scores, weights=weights))


def _scores(lines: Sequence[Mapping[str, Any]], model: str) -> tuple[list[float], list[float]]:
    """The scores of a model, and the weight of each."""
    scores = [line["scores"][model][line["metric"]] for line in lines]
    return scores, [METRICS[line["metric"]].weight(line["expected"]) for line in lines]
