"""How fast others fine-tune the same model on the same data: ms-swift and TRL, side by side.

    python benchmarks/peers.py --swift build/peers/ms-swift/bin/swift [--trl build/peers/trl/bin/python] [--rounds 3]

Same checkpoint, photographs, batch, precision and supervised tokens; LoRA r 16, alpha 32, on all linear layers of the
language model and nothing else (with vision trained the tower too: whole here, by adapters there). Here images are
sliced before (raw shards), and batches hold samples of like length. Each is one process of all threads; how long an
epoch takes by a process a core, each with its part of the batch, is told beside it. All say themselves how long their
training loop took, imports and loading apart. An epoch from the second on is what three epochs take more than one,
halved; here it is a third of three, since stored features are computed before the loop.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from results import keep, result
from rich.console import Console
from shapes import write_checkpoint, write_photographs

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import as_flags
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.reports.training_record import read_record

FOLDER = Path("build/bench/peers")
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
    """Measure by turns, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, required=True, help="its command")
    parser.add_argument("--trl", type=Path, help="the Python that TRL is installed for")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--photographs", type=int, default=120, help="of an epoch")
    parser.add_argument("--attention", default="sdpa", help="of ms-swift: sdpa or eager")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str((FOLDER / "cache").absolute())  # so that shards of an earlier run are not found
    base = write_checkpoint(FOLDER / "base")
    write_photographs(FOLDER, options.photographs)
    started = time.monotonic()
    shards = _prepare(base)
    prepared = time.monotonic() - started
    stores = itertools.count()

    def here(epochs: int, vision: bool, processes: int) -> float:
        return _ours(base, shards, epochs, vision, processes, next(stores))

    def swift(epochs: int, vision: bool, processes: int) -> float:
        return _swift(options, base, epochs, vision, processes)

    cores = os.cpu_count() or 1
    apiece = {"ms-swift": swift(1, False, cores), "here": here(1, False, cores)}
    theirs: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    ours: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    trl: list[float] = []
    for _ in range(options.rounds):
        for name, epochs, vision in (("one", 1, False), ("three", 3, False), ("vision", 1, True)):
            theirs[name].append(swift(epochs, vision, 1))
            ours[name].append(here(epochs, vision, 1))
        if options.trl:
            trl.append(_trl(options.trl))
    raw = f"raw seconds: ms-swift {_rounded(theirs)}, here {_rounded(ours)}; an epoch by a process a core {apiece}"
    facts = f"{os.cpu_count()} cores, {platform.machine()}, load {load:.1f} → {os.getloadavg()[0]:.1f}"
    first, later = statistics.median(ours["one"]), statistics.median(ours["three"]) / 3
    apart = f"without preprocess, which took {prepared:.1f} s once"
    swift_later = (statistics.median(theirs["three"]) - statistics.median(theirs["one"])) / 2
    rows = [
        result("ms_swift_frozen_later_epochs", swift_later / later, 4.0, f"{raw}; {facts}"),
        result("ms_swift_first_epoch", statistics.median(theirs["one"]) / first, 2.0, f"{apart}; {raw}; {facts}"),
        result(
            "ms_swift_vision_trained",
            statistics.median(theirs["vision"]) / statistics.median(ours["vision"]),
            2.0,
            f"{raw}; {facts}",
        ),
    ]
    if trl:
        raw = f"raw seconds: TRL {trl}, here {_rounded(ours)}"
        rows += [
            result("trl_frozen_later_epochs", statistics.median(trl) / later, 4.0, f"{raw}; {facts}"),
            result("trl_first_epoch", statistics.median(trl) / first, 2.0, f"{apart}; {raw}; {facts}"),
        ]
    keep(rows)
    for row in rows:
        Console().print(row)


def _prepare(base: Path) -> Path:
    dataset, shards, rejects = FOLDER / "dataset", FOLDER / "shards", FOLDER / "rejects.jsonl"
    validate_data(str(FOLDER / "photographs.json"), None, dataset, rejects, ValidationSettings(eval_fraction=0))
    preprocess(dataset, str(base), shards, rejects, PreprocessSettings(model_max_length=LONGEST, codec="raw"))
    return shards


def _ours(base: Path, shards: Path, epochs: int, vision: bool, processes: int, number: int) -> float:
    """Seconds of our training loop, with a store of features that no earlier run has left."""
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


def _swift(options: argparse.Namespace, base: Path, epochs: int, vision: bool, processes: int) -> float:
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
    several = {"NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    _run_peer("ms-swift", [str(options.swift), "sft", *as_flags(flags)], processes, several)
    log = max(out.rglob("logging.jsonl"), key=lambda path: path.stat().st_mtime)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return float(next(entry["train_runtime"] for entry in reversed(entries) if "train_runtime" in entry))


def _trl(python: Path) -> float:
    """Seconds of TRL's training loop over an epoch; a later one takes it as long."""
    script = Path(__file__).with_name("peers_trl.py")
    settings = [str(SHARED[name]) for name in ("dataloader_num_workers", "learning_rate")]
    said = _run_peer("TRL", [str(python), str(script), str(FOLDER), "1", str(BATCH), *settings])
    return float(json.loads(said.splitlines()[-1])["seconds"])


def _run_peer(name: str, command: list[str], processes: int = 1, further: Mapping[str, str] | None = None) -> str:
    """What a peer's training printed, run without a GPU, the network or this environment's packages."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **(further or {})}
    environment["OMP_NUM_THREADS"] = _threads(processes)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def _threads(processes: int) -> str:
    """Of each process: all cores for one, or its share."""
    return str((os.cpu_count() or 1) // processes)


def _rounded(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 1) for value in values] for name, values in runs.items()}


if __name__ == "__main__":
    sys.exit(main())
