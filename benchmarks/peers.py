"""Training speed of this project against ms-swift and TRL, with the same model and the same data.

    python benchmarks/peers.py --swift build/peers/ms-swift/bin/swift [--trl build/peers/trl/bin/python] [--rounds 3]

Checkpoint, photographs, batch size, precision and supervised tokens are the same. All train LoRA with rank 16 and alpha
32 on all linear layers of the language model and nothing else; in the runs that train vision, the vision tower is
trained too: in full by this project, with adapters by ms-swift. This project slices images beforehand (raw shards) and
groups samples of similar length into batches. Each runs as one process with a thread per core; an epoch with one
process per core, each with its share of the batch, is reported in addition. Each reports the seconds of its own
training loop, without imports and loading. For ms-swift, an epoch after the first is half the difference between three
epochs and one; for this project it is a third of three epochs, because stored features are computed before the loop.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import make_result, save_results
from rich.console import Console
from shapes import write_checkpoint, write_photographs

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import as_flags
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.reports.training_record import read_record

FOLDER = Path("build/bench/peers")
_ENVIRONMENT = dict(os.environ)  # without what our own trainings set in it
LONGEST = 8192
BATCH = 4
SHARED = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "dataloader_num_workers": 2,
    "save_strategy": "no",
    "logging_steps": 10,
    "lora_alpha": 32,
    "optim": "adamw_torch_fused",
}


def main() -> None:
    """Measure alternately, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, required=True, help="command of ms-swift")
    parser.add_argument("--trl", type=Path, help="Python interpreter of the environment with TRL")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each")
    parser.add_argument("--photographs", type=int, default=120, help="photographs in an epoch")
    parser.add_argument("--attention", default="sdpa", help="attention of ms-swift: sdpa or eager")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str((FOLDER / "cache").absolute())  # so that shards of an earlier run are not reused
    base = write_checkpoint(FOLDER / "base")
    write_photographs(FOLDER, options.photographs)
    started = time.monotonic()
    shards = _prepare(base)
    prepared = time.monotonic() - started
    store_numbers = itertools.count()

    def ours(epochs: int, vision: bool, processes: int) -> float:
        return _train_ours(base, shards, epochs, vision, processes, next(store_numbers))

    def swift(epochs: int, vision: bool, processes: int) -> float:
        return _train_swift(options, base, epochs, vision, processes)

    cores = os.cpu_count() or 1
    per_core = {"ms-swift": swift(1, False, cores), "ours": ours(1, False, cores)}
    swift_seconds: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    our_seconds: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    trl_seconds: list[float] = []
    for _ in range(options.rounds):
        for name, epochs, vision in (("one", 1, False), ("three", 3, False), ("vision", 1, True)):
            swift_seconds[name].append(swift(epochs, vision, 1))
            our_seconds[name].append(ours(epochs, vision, 1))
        if options.trl:
            trl_seconds.append(_train_trl(options.trl))
    turns = os.environ["GOMP_SPINCOUNT"]  # set by our first training
    facts = (
        f"{os.cpu_count()} cores, {platform.machine()}, load {load:.1f} → {os.getloadavg()[0]:.1f}, our threads spin "
        f"{turns} turns"
    )
    note = f"without preprocess, which took {prepared:.1f} s once"
    rows = _compare(
        our_seconds, swift_seconds, trl_seconds, f"an epoch with one process per core {per_core}", note, facts
    )
    save_results(rows)
    for row in rows:
        Console().print(row)


def _compare(
    our_seconds: dict[str, list[float]],
    swift_seconds: dict[str, list[float]],
    trl_seconds: list[float],
    per_core: str,
    note: str,
    facts: str,
) -> list[dict[str, Any]]:
    """The rows of the results."""
    raw = f"raw seconds: ms-swift {_rounded(swift_seconds)}, ours {_rounded(our_seconds)}; {per_core}"
    first, later = statistics.median(our_seconds["one"]), statistics.median(our_seconds["three"]) / 3
    swift_first, swift_three = statistics.median(swift_seconds["one"]), statistics.median(swift_seconds["three"])
    swift_later = (swift_three - swift_first) / 2
    rows = [
        make_result("ms_swift_frozen_later_epochs", swift_later / later, 6.0, f"{raw}; {facts}"),
        make_result("ms_swift_first_epoch", swift_first / first, 2.5, f"{note}; {raw}; {facts}"),
        make_result(
            "ms_swift_vision_trained",
            statistics.median(swift_seconds["vision"]) / statistics.median(our_seconds["vision"]),
            3.0,
            f"{raw}; {facts}",
        ),
    ]
    if trl_seconds:
        raw = f"raw seconds: TRL {trl_seconds}, ours {_rounded(our_seconds)}"
        trl = statistics.median(trl_seconds)
        rows += [
            make_result("trl_frozen_later_epochs", trl / later, 6.0, f"{raw}; {facts}"),
            make_result("trl_first_epoch", trl / first, 2.5, f"{note}; {raw}; {facts}"),
        ]
    return rows


def _prepare(base: Path) -> Path:
    """Validate the photographs and write them to shards; returns the folder of the shards."""
    dataset, shards, rejects = FOLDER / "dataset", FOLDER / "shards", FOLDER / "rejects.jsonl"
    validate_data(str(FOLDER / "photographs.json"), "", dataset, rejects, ValidationSettings(eval_fraction=0))
    preprocess(
        dataset, str(base), shards, FOLDER / "too-long.jsonl", PreprocessSettings(model_max_length=LONGEST, codec="raw")
    )
    return shards


def _train_ours(base: Path, shards: Path, epochs: int, vision: bool, processes: int, number: int) -> float:
    """Seconds of this project's training loop, with an empty feature store."""
    out = FOLDER / "ours"
    flags = {
        **SHARED,
        "per_device_train_batch_size": BATCH // processes,
        "model_name_or_path": base,
        "data_path": shards,
        "output_dir": out,
        "cache_dir": FOLDER / f"cache-{number}",
        "num_train_epochs": epochs,
        "use_lora": True,
        "tune_llm": False,
        "tune_vision": vision,
        "lora_r": 16,
        "lora_modules_to_save": "none",
        "lora_target_modules": r"model\.language_model\.layers\.\d+\..*proj.*",
        "model_max_length": LONGEST,
        "group_by_length": True,
        "use_cpu": True,
    }
    os.environ["OMP_NUM_THREADS"] = _threads(processes)
    launch(as_flags(flags), processes)
    return read_record(out).metrics["seconds"]


def _train_swift(options: argparse.Namespace, base: Path, epochs: int, vision: bool, processes: int) -> float:
    """Seconds of ms-swift's training loop."""
    out = FOLDER / "swift"
    flags = {
        **SHARED,
        "per_device_train_batch_size": BATCH // processes,
        "model": base,
        "model_type": "minicpmv4_6",
        "dataset": FOLDER / "photographs.jsonl",
        "split_dataset_ratio": 0,
        "output_dir": out,
        "num_train_epochs": epochs,
        "tuner_type": "lora",
        "lora_rank": 16,
        "target_modules": "all-linear",
        "freeze_vit": str(not vision).lower(),
        "freeze_aligner": str(not vision).lower(),
        "max_length": LONGEST,
        "torch_dtype": "float32",
        "attn_impl": options.attention,
        "gradient_checkpointing": "false",
        "report_to": "none",
    }
    if processes > 1:
        flags["ddp_backend"] = "gloo"
    launch_variables = {"NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    _run_peer("ms-swift", [str(options.swift), "sft", *as_flags(flags)], processes, launch_variables)
    log = max(out.rglob("logging.jsonl"), key=lambda path: path.stat().st_mtime)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return float(next(entry["train_runtime"] for entry in reversed(entries) if "train_runtime" in entry))


def _train_trl(python: Path) -> float:
    """Seconds of TRL's training loop over one epoch; later epochs take equally long."""
    script = Path(__file__).with_name("peers_trl.py")
    settings = [str(SHARED[name]) for name in ("dataloader_num_workers", "learning_rate")]
    printed = _run_peer("TRL", [str(python), str(script), str(FOLDER), "1", str(BATCH), *settings])
    return float(json.loads(printed.splitlines()[-1])["seconds"])


def _run_peer(name: str, command: list[str], processes: int = 1, further: Mapping[str, str] | None = None) -> str:
    """Run another project's training without a GPU, network or this environment's packages; returns its output."""
    environment = {**_ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **(further or {})}
    environment["OMP_NUM_THREADS"] = _threads(processes)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def _threads(processes: int) -> str:
    """Number of threads per process: the cores divided among the processes."""
    return str((os.cpu_count() or 1) // processes)


def _rounded(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 1) for value in values] for name, values in runs.items()}


if __name__ == "__main__":
    main()
