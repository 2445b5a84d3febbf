"""Time and memory of merging an adapter, against `cp` of the same bytes; both include flushing to the disk.

    python benchmarks/merge.py [--gigabytes 4] [--rounds 3]

The checkpoint is a MiniCPM-V 4.6 with random weights and as many layers as the size requires. The adapter is what the
pipeline's defaults train: LoRA on the attention, and embeddings, merger and vision tower in full. Copying and merging
alternate, so that other load on the disk affects both. Memory is read every few milliseconds from outside the merging
process, so that the process's own report can be compared with it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from results import make_result
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

from minicpmv_finetune.minicpmv.generations import MINICPMV_4_6

RESULTS = Path("build/bench/merge.jsonl")
SHARD_BYTES = 10**9
RANK = 64
MERGE = """
import sys
from pathlib import Path
from minicpmv_finetune.components.merge.streaming import stream
done = stream(*map(Path, sys.argv[1:]))
print(done.memory.model_dump_json(), done.seconds, sep="\\n")
"""


def main() -> None:
    """Measure, print a table, and write two lines of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/bench/merge"),
        help="folder for temporary files, three times the size",
    )
    options = parser.parse_args()
    try:
        base, size = write_base(options.folder / "base", options.gigabytes * 1e9)
        adapter = write_adapter(options.folder / "adapter", base)
        copying, merging, memory = [], [], []
        for _ in range(options.rounds):
            copying.append(copy(base, options.folder / "copy"))
            seconds, used = merge(base, adapter, options.folder / "merged")
            merging.append(seconds)
            memory.append(used)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    report(size, copying, merging, memory)


def write_base(folder: Path, size: float) -> tuple[Path, int]:
    """Write a checkpoint of about `size` bytes in bf16; returns its folder and its exact number of bytes."""
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
    }
    one, two = (_count_bytes(_shapes(_make_config(text, layers))) for layers in (1, 2))
    config = _make_config(text, max(1, round((size - one) / (two - one)) + 1))
    config.save_pretrained(folder)

    shard: dict[str, torch.Tensor] = {}
    shards: list[dict[str, torch.Tensor]] = []
    weight_map: dict[str, str] = {}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def write_shard() -> None:
        name = f"model-{len(shards) + 1:05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, {"format": "pt"})
        shards.append({})
        shard.clear()

    for name, shape in _shapes(config).items():
        repeats = -(-shape.numel() // len(noise))
        shard[name] = noise.repeat(repeats)[: shape.numel()].reshape(shape).clone()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            write_shard()
    write_shard()
    total = _count_bytes(_shapes(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder, total


def write_adapter(folder: Path, base: Path) -> Path:
    """Write an adapter as training with the pipeline's defaults writes it."""
    shapes = _shapes(MiniCPMV4_6Config.from_pretrained(base))
    trained_in_full = (MINICPMV_4_6.embed_tokens, MINICPMV_4_6.merger, MINICPMV_4_6.vision_tower)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name.startswith(tuple(f"{part}." for part in trained_in_full)):
            tensors[f"base_model.model.{name}"] = torch.full(shape, 0.01, dtype=torch.bfloat16)
        elif module.startswith(MINICPMV_4_6.language_model) and module.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.full((RANK, shape[1]), 0.01)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.full((shape[0], RANK), 0.01)
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=MINICPMV_4_6.lora_target_modules, modules_to_save=list(trained_in_full)
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def copy(base: Path, target: Path) -> float:
    """Seconds to copy the weights and flush them to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    os.sync()
    started = time.monotonic()
    files = sorted(base.glob("*.safetensors"))
    subprocess.run(["cp", "--reflink=never", *map(str, files), str(target)], check=True)  # noqa: S603, S607
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def merge(base: Path, adapter: Path, target: Path) -> tuple[float, dict[str, int]]:
    """Seconds to merge, without imports, and the memory: as the process reports it and as observed from outside."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    os.sync()
    arguments = [sys.executable, "-c", MERGE, str(base), str(adapter), str(target)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)  # noqa: S603
    observed = 0
    while process.poll() is None:
        observed = max(observed, _anonymous_memory(process.pid))
        time.sleep(0.005)
    assert process.stdout is not None  # noqa: S101
    memory, seconds = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"merging ended with exit code {process.returncode}")
    shutil.rmtree(target)
    return float(seconds), json.loads(memory) | {"observed": observed}


def report(size: int, copying: list[float], merging: list[float], memory: list[dict[str, int]]) -> None:
    """Print the table and write the results."""
    copied, merged = statistics.median(copying), statistics.median(merging)
    worst = max(memory, key=lambda used: used["observed"] / used["bound"])
    rows = [
        make_result(
            "merge_vs_cp",
            copied / merged,
            0.5,
            f"{size / 1e9:.2f} GB with fsync, medians: cp {copied:.2f} s ({size / copied / 1e9:.2f} GB/s), "
            f"merge {merged:.2f} s ({size / merged / 1e9:.2f} GB/s); cp {_join(copying)}, merge {_join(merging)}",
        ),
        make_result(
            "merge_peak_memory_vs_bound",
            worst["observed"] / worst["bound"],
            1.0,
            f"anonymous memory {worst['observed'] / 1e6:.0f} MB at most, bound {worst['bound'] / 1e6:.0f} MB "
            f"(baseline {worst['baseline'] / 1e6:.0f} MB, largest tensor {worst['largest_tensor'] / 1e6:.0f} MB)",
            at_most=True,
        ),
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("experiment", "ratio", "target", "holds", "detail")
    for row in rows:
        table.add_row(*(str(row[column]) for column in ("name", "ratio", "target", "holds", "detail")))
    Console().print(table)


def _make_config(text: dict[str, object], layer_count: int) -> MiniCPMV4_6Config:
    layers = {"num_hidden_layers": layer_count, "layer_types": ["full_attention"] * layer_count}
    return MiniCPMV4_6Config(text_config=text | layers, tie_word_embeddings=False, dtype="bfloat16")


def _count_bytes(shapes: dict[str, torch.Size]) -> int:
    """Bytes of tensors in bf16."""
    return sum(2 * shape.numel() for shape in shapes.values())


def _shapes(config: MiniCPMV4_6Config) -> dict[str, torch.Size]:
    """The name and shape of each weight."""
    with torch.device("meta"):
        model = MiniCPMV4_6ForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _anonymous_memory(process: int) -> int:
    """Bytes of a process's memory without files that are mapped into it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _join(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)


if __name__ == "__main__":
    main()
