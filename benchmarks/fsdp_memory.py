"""Main memory of two processes that load a model of a gigabyte in bf16 and divide it by FSDP2.

    python benchmarks/fsdp_memory.py

They prepare and divide the model by the functions of a training, on CPUs, where a process's part stays in main memory;
on a GPU it does not. Counted is what a process has written (RssAnon) since before it loaded the model, and beside it
the pages of the checkpoint's file, which all processes share and Linux may drop.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shapes import Shape, make_model

PROCESSES = 2
KINDS = {"LoRA": "--use_lora true --tune_llm false --tune_vision false", "full": ""}
_SHAPE = Shape(text=1536, layers=16, vocabulary=60_000, vision=256, vision_layers=4)
_SECONDS = 0.005  # between two looks at the memory


class Peak:
    """The most memory that this process had, in bytes.

    Attributes:
        written: Memory that it had written itself.
        file: Pages of files.
    """

    def __init__(self) -> None:
        self.written = self.file = 0

    def look(self) -> None:
        """Compare with the present."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        written, file = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        self.written, self.file = max(self.written, written), max(self.file, file)


@contextmanager
def measured() -> Iterator[Peak]:
    """Look at the memory as long as a block runs."""
    peak, ended = Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            peak.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        peak.look()
        ended.set()
        thread.join()


def write_model(folder: Path) -> int:
    """Write the checkpoint; returns its number of parameters."""
    model = make_model("2.6", _SHAPE).bfloat16()
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def start_process(rank: int, port: int, checkpoint: Path, kind: str, answers: Any) -> None:
    """Load and divide the model; answers with the peaks of both in bytes, and the number of trained parameters."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch

    from minicpmv_finetune.components.train import arguments, finetune
    from minicpmv_finetune.components.train.fsdp import divide
    from minicpmv_finetune.minicpmv.generations import detect_generation

    torch.distributed.init_process_group("gloo")
    flags = ["--output_dir", "out", "--data_path", "data", "--use_cpu", "true", "--bf16", "true", *KINDS[kind].split()]
    given = arguments.parse(flags)
    given.training.fsdp = "full_shard"  # which a user's training refuses on a CPU
    manifest = SimpleNamespace(rows=lambda split: 1)
    inputs: Any = SimpleNamespace(base=checkpoint, generation=detect_generation(checkpoint), manifest=manifest)
    accelerator = make_accelerator()
    before = Peak()
    before.look()
    with measured() as loading:
        model: Any = finetune._prepare_model(inputs, given)
    with measured() as dividing:
        divide(accelerator, model.trained)
    answers.put(
        {
            "trained": model.trainable,
            "loading": loading.written - before.written,
            "dividing": dividing.written - before.written,
            "file": max(loading.file, dividing.file) - before.file,
        }
    )
    torch.distributed.destroy_process_group()


def make_accelerator() -> SimpleNamespace:
    """What the division reads of accelerate's Accelerator, which itself would not divide a model among CPUs."""
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    plugin.set_mixed_precision("bf16")
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_main_process=False, device=torch.device("cpu"))


def measure(checkpoint: Path, kind: str) -> list[dict[str, int]]:
    """What each process answers."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(target=start_process, args=(rank, port, checkpoint, kind, answers)) for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Measure, and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        total = write_model(checkpoint)
        rows = [(kind, row) for kind in KINDS for row in measure(checkpoint, kind)]
    print(f"{total / 1e6:,.0f} million parameters, {PROCESSES} processes, MB of each")
    print(f"{'':6}{'trained':>12}{'loading':>10}{'dividing':>10}{'file':>10}")
    for kind, row in rows:
        sizes = "".join(f"{row[name] / 1e6:>10,.0f}" for name in ("loading", "dividing", "file"))
        print(f"{kind:6}{row['trained'] / 1e6:>10,.0f} M{sizes}")


if __name__ == "__main__":
    main()
