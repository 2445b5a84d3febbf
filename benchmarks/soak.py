"""Search for leaks: memory and open files over 2,000 training steps and 200 compilations.

    python benchmarks/soak.py [--steps 2000] [--compilations 200]

Memory and file descriptors are read after a tenth of the work, when caches are full, and at the end.
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

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.arguments import as_flags

RESULTS = Path("build/bench/soak.jsonl")
BATCH = 4
TENTH = 10


@dataclass(frozen=True)
class Resources:
    """Resources that a process uses.

    Attributes:
        megabytes: Resident memory.
        files: Number of open files.
    """

    megabytes: float
    files: int


def main() -> None:
    """Run both experiments, print, and write the results."""
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


def train(folder: Path, steps: int) -> tuple[Resources, Resources]:
    """Train on digits; returns the resources of the training process after a tenth of the steps and at the end."""
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
    variables = {**os.environ, environment.PROGRESS_SECONDS.name: "1"}
    observed: list[tuple[int, Resources]] = []
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None  # noqa: S101
        for line in process.stderr:
            if progress := re.match(r"train .*\| (\d+)/\d+", line):
                observed.append((int(progress[1]) // BATCH, read_resources(psutil.Process(process.pid))))
    if process.returncode:
        raise SystemExit(f"the training ended with exit code {process.returncode}.")
    early = next(resources for step, resources in observed if step >= steps // TENTH)
    return early, observed[-1][1]


def compile_often(folder: Path, count: int) -> tuple[Resources, Resources]:
    """Compile the pipeline in this process; returns its resources after a tenth of the compilations and at the end."""
    from minicpmv_finetune.pipelines.finetuning import FINETUNE

    observed = []
    for _ in range(count):
        FINETUNE.write(folder / "pipeline.yaml")
        gc.collect()
        observed.append(read_resources(psutil.Process()))
    return observed[count // TENTH - 1], observed[-1]


def read_resources(process: psutil.Process) -> Resources:
    """The resources that a process uses now."""
    return Resources(process.memory_info().rss / 1e6, process.num_fds())


if __name__ == "__main__":
    main()
