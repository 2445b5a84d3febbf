"""How fast others fine-tune the same model on the same data: ms-swift, side by side.

    python benchmarks/peers.py --swift build/peers/ms-swift/bin/swift [--rounds 3]

Same checkpoint, photographs, batch, precision and supervised tokens; LoRA r 16, alpha 32, on all linear layers of the
language model. Here the merger and the embeddings are trained whole beside it, which ms-swift's run leaves frozen;
pictures are sliced before (raw shards), and batches hold samples of like length. Both
say themselves how long their training loop took, imports and loading apart. An epoch from the second on is what three
epochs take more than one, halved; here it is a third of three, since stored features are computed before the loop, and
the seconds for that are told apart.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from shapes import write_checkpoint, write_photographs

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import as_flags
from minicpmv_finetune.components.train.train import launch
from minicpmv_finetune.components.training_record import read_record
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data

RESULTS = Path("build/bench/speed.jsonl")
FOLDER = Path("build/bench/peers")
LONGEST = 8192
SHARED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "dataloader_num_workers": 2,
    "save_strategy": "no",
    "logging_steps": 10,
    "lora_alpha": 32,
}


def main() -> None:
    """Measure by turns, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, required=True, help="its command")
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
    swift: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    ours: dict[str, list[float]] = {"one": [], "three": [], "vision": []}
    for number in range(options.rounds):
        for name, epochs, vision in (("one", 1, False), ("three", 3, False), ("vision", 1, True)):
            swift[name].append(_swift(options, base, epochs, vision))
            ours[name].append(_ours(base, shards, epochs, vision, number))
    theirs_later = (statistics.median(swift["three"]) - statistics.median(swift["one"])) / 2
    ours_later = statistics.median(ours["three"]) / 3
    raw = f"raw seconds: ms-swift {_rounded(swift)}, here {_rounded(ours)}"
    facts = f"{os.cpu_count()} cores, {platform.machine()}, load {load:.1f} → {os.getloadavg()[0]:.1f}"
    rows = [
        _result("ms_swift_frozen_later_epochs", theirs_later / ours_later, 4.0, f"{raw}; {facts}"),
        _result(
            "ms_swift_first_epoch",
            statistics.median(swift["one"]) / statistics.median(ours["one"]),
            2.0,
            f"without preprocess, which took {prepared:.1f} s once; {raw}; {facts}",
        ),
        _result(
            "ms_swift_vision_trained",
            statistics.median(swift["vision"]) / statistics.median(ours["vision"]),
            2.0,
            f"{raw}; {facts}",
        ),
    ]
    names = {row["name"] for row in rows}
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    everything = [row for row in kept if row["name"] not in names] + rows
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in everything))
    for row in rows:
        Console().print(row)


def _prepare(base: Path) -> Path:
    dataset, shards, rejects = FOLDER / "dataset", FOLDER / "shards", FOLDER / "rejects.jsonl"
    validate_data(str(FOLDER / "photographs.json"), None, dataset, rejects, ValidationSettings(eval_fraction=0))
    preprocess(dataset, str(base), shards, rejects, PreprocessSettings(model_max_length=LONGEST, codec="raw"))
    return shards


def _ours(base: Path, shards: Path, epochs: int, vision: bool, number: int) -> float:
    """Seconds of our training loop."""
    out = FOLDER / "ours"
    flags = {
        **SHARED,
        "model_name_or_path": base,
        "data_path": shards,
        "output_dir": out,
        "cache_dir": FOLDER / f"cache-{number}",
        "num_train_epochs": epochs,
        "use_lora": True,
        "tune_llm": False,
        "tune_vision": vision,
        "lora_r": 16,
        "lora_target_modules": r"model\.language_model\.layers\.\d+\..*proj.*",
        "model_max_length": LONGEST,
        "group_by_length": True,
        "use_cpu": True,
    }
    launch(as_flags(flags), 1)
    return read_record(out).metrics["seconds"]


def _swift(options: argparse.Namespace, base: Path, epochs: int, vision: bool) -> float:
    """Seconds of ms-swift's training loop."""
    out = FOLDER / "swift"
    flags = {
        **SHARED,
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
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": _threads()}
    environment.pop("PYTHONPATH", None)
    command = [str(options.swift), "sft", *as_flags(flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(
            f"ms-swift ended with exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    log = max(out.rglob("logging.jsonl"), key=lambda path: path.stat().st_mtime)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return float(next(entry["train_runtime"] for entry in reversed(entries) if "train_runtime" in entry))


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))


def _rounded(runs: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 1) for value in values] for name, values in runs.items()}


def _result(name: str, ratio: float, target: float, detail: str) -> dict[str, Any]:
    return {"name": name, "ratio": round(ratio, 3), "target": target, "holds": ratio >= target, "detail": detail}


if __name__ == "__main__":
    sys.exit(main())
