"""What grows when it should not: memory and open files over 2,000 training steps and 200 compilations.

    python benchmarks/soak.py [--steps 2000] [--compilations 200]

Memory and file descriptors are taken after a tenth of the work, when caches have filled, and at its end.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from shapes import prepare_digits

from minicpmv_finetune.components.train.arguments import as_flags

RESULTS = Path("build/bench/soak.jsonl")
BATCH = 4
TENTH = 10


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    megabytes: float
    files: int


def main() -> None:
    """Run both, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--compilations", type=int, default=200)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, work, count in (
            ("soak_training", train, options.steps),
            ("soak_compilation", compile_often, options.compilations),
        ):
            early, late = work(Path(folder), count)
            growth = late.megabytes / early.megabytes
            memory = f"{early.megabytes:.0f} → {late.megabytes:.0f} MB"
            detail = f"{count // TENTH:,} → {count:,}: {memory}, {early.files} → {late.files} open files"
            holds = growth <= 1.05 and late.files <= early.files + 2
            rows.append({"name": name, "ratio": round(growth, 3), "target": 1.05, "holds": holds, "detail": detail})
            Console().print(rows[-1])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, steps: int) -> tuple[Held, Held]:
    """Train on digits for so many steps, and look at the training process with each line of its progress."""
    base, shards = prepare_digits(folder)
    flags = {
        "model_name_or_path": base,
        "data_path": shards,
        "output_dir": folder / "out",
        "use_cpu": True,
        "use_lora": True,
        "tune_llm": False,
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "save_steps": 200,
    }
    command = [sys.executable, "-m", "minicpmv_finetune.components.train.finetune", *as_flags(flags)]
    environment = {**os.environ, "MINICPMV_PROGRESS_SECONDS": "1"}
    seen: list[tuple[int, Held]] = []
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None  # noqa: S101
        for line in process.stderr:
            if progress := re.match(r"train .*\| (\d+)/\d+", line):
                seen.append((int(progress[1]) // BATCH, held(psutil.Process(process.pid))))
    if process.returncode:
        raise SystemExit(f"the training ended with exit code {process.returncode}.")
    early = next(what for step, what in seen if step >= steps // TENTH)
    return early, seen[-1][1]


def compile_often(folder: Path, count: int) -> tuple[Held, Held]:
    """Compile the pipeline so many times, in this process."""
    from minicpmv_finetune.pipelines.finetuning import FINETUNE

    seen = []
    for _ in range(count):
        FINETUNE.write(folder / "pipeline.yaml")
        gc.collect()
        seen.append(held(psutil.Process()))
    return seen[count // TENTH - 1], seen[-1]


def held(process: psutil.Process) -> Held:
    """What a process holds now."""
    return Held(process.memory_info().rss / 1e6, process.num_fds())


if __name__ == "__main__":
    main()
