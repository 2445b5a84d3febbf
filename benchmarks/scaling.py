"""What 1 to 64 nodes take from the object store and from the network, and what that costs in time.

    python benchmarks/scaling.py [--write]

Requests and bytes are counted while shards are read from a real S3 server on this machine, and the bytes of an averaged
gradient while two processes exchange it. The rest is computed from them, from the sizes of the published models and
from the formulas of `plan`. With --write the tables replace those in docs/scaling.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data import SIZES, make_dataset, s3_server, write_checkpoint
from pages import replace_part, table

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.preprocess.shard_tasks import SHARD_BYTES
from minicpmv_finetune.estimate.cost import estimate_flops
from minicpmv_finetune.estimate.efficiency import PEAK_FLOPS, REFERENCE_GPU, expected_hours
from minicpmv_finetune.estimate.published import published_model
from minicpmv_finetune.inputs.planned import planned
from minicpmv_finetune.inputs.recipe import RECIPES, hardware_of, read_recipe
from minicpmv_finetune.inputs.recipe_costs import SLICES, TOKENS
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, check_inputs
from minicpmv_finetune.shards import cache
from minicpmv_finetune.shards.format import _CACHED_ROW_GROUPS as CACHED_ROW_GROUPS
from minicpmv_finetune.shards.format import ROW_GROUP_BYTES, ShardReader
from minicpmv_finetune.storage import s3

PAGE = Path("docs/scaling.md")
RESULTS = Path("build/bench/scaling.jsonl")
BEGIN, END = "<!-- written by benchmarks/scaling.py -->", "<!-- end of what benchmarks/scaling.py writes -->"
SAMPLES = {"1344": 60, "640": 300}  # of an experiment
IMAGES = {"640": "640×480", "1344": "1344×1344"}
NODES = (1, 2, 8, 64)
GIGABITS = (10, 25, 100, 400)
FLOAT32, BF16 = 4, 2  # bytes of a number
EXCHANGED = 4_000_000  # numbers of the gradient that two processes exchange
EXCHANGES = 5

PEER = """
import os, sys, time
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411", "GLOO_SOCKET_IFNAME": "lo"}
rank, numbers, steps = map(int, sys.argv[1:])
distributed.init_process_group("gloo", rank=rank, world_size=2)
model = DistributedDataParallel(torch.nn.Linear(numbers // 1000, 1000, bias=False))

def sent() -> int:
    line = next(line for line in open("/proc/net/dev") if line.strip().startswith("lo:"))
    return int(line.split()[1])

def step() -> None:
    model(torch.ones(1, numbers // 1000)).sum().backward()

step()
distributed.barrier()
before = sent()
for _ in range(steps):
    step()
distributed.barrier()
if rank == 0:
    print((sent() - before) / steps, flush=True)
distributed.destroy_process_group()
"""


def main() -> None:
    """Measure, compute, print the tables, and write them into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/scaling.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reads = measure_reads(Path(folder))
    gradient = measure_gradient()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(f"{json.dumps(row)}\n" for row in [*reads, gradient]))
    tables = write_tables(reads, gradient)
    print(tables)
    if options.write:
        replace_part(PAGE, BEGIN, END, f"\n{tables}\n")


def measure_reads(folder: Path) -> list[dict[str, Any]]:
    """Requests and bytes of a node that copies all shards, and of one that reads rows in random order."""
    base = write_checkpoint(folder / "base")
    rows = []
    with s3_server(folder / "server"):
        for size, samples in SAMPLES.items():
            dataset, prepared = make_dataset(folder / size, SIZES[size], samples), folder / f"shards-{size}"
            settings = PreprocessSettings(model_max_length=4096)
            manifest = preprocess(
                dataset, str(base), prepared, folder / f"{size}.jsonl", settings, f"s3://ours/{size}", num_workers=1
            )
            row = {"image": IMAGES[size], "samples": samples, "bytes a sample": manifest.bytes / samples}
            uri = f"s3://ours/{size}/{manifest.key}"
            with counted() as count:
                cache.open_shards(uri, folder / f"copy-{size}")
            row |= {"files": len(manifest.files), "copy requests": count["GetObject"], "copy bytes": count["bytes"]}
            with patch.object(cache, "_fits_on_disk", return_value=False):
                reader = ShardReader(cache.open_shards(uri, folder / f"rows-{size}"), "train")
            order = [number * 37 % samples for number in range(samples)]
            with counted() as count:
                for number in order:
                    _ = reader[number]
            row |= {"epoch requests": count["GetObject"], "epoch bytes": count["bytes"], "groups": len(reader._groups)}
            rows.append(row)
    return rows


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the requests of this process to the store, by operation, and the bytes of its answers as `bytes`."""
    count: Counter[str] = Counter()

    def receive(http_response: Any, model: Any, **_: Any) -> None:
        count[model.name] += 1
        count["bytes"] += int(http_response.headers.get("Content-Length", 0))

    clients = [s3.client(validates) for validates in (True, False)]
    for client in clients:
        client.meta.events.register("after-call.s3.GetObject", receive, unique_id="counted")
    try:
        yield count
    finally:
        for client in clients:
            client.meta.events.unregister("after-call.s3.GetObject", receive, unique_id="counted")


def measure_gradient() -> dict[str, Any]:
    """Bytes that two processes of DDP send in a step, both together, in a network of their own."""
    command = [sys.executable, "-c", PEER]
    script = " & ".join(f'"$@" {rank} {EXCHANGED} {EXCHANGES}' for rank in (0, 1))
    unshare = shutil.which("unshare")
    if not unshare:
        raise SystemExit("unshare (util-linux) is missing: it gives the two processes a network of their own.")
    prepare = f"{sys.executable} -c 'import fcntl, socket, struct; s = socket.socket(); " + (
        'fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x49))\''
    )
    found = subprocess.run(  # noqa: S603
        [unshare, "--net", "--map-root-user", "sh", "-c", f"{prepare}; {script}; wait", "sh", *command],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {"processes": 2, "gradient bytes": EXCHANGED * FLOAT32, "sent bytes": float(found.stdout)}


def write_tables(reads: Sequence[dict[str, Any]], gradient: dict[str, Any]) -> str:
    """The tables in Markdown."""
    computed = 2 * gradient["gradient bytes"]
    exchanged = (
        f"Measured: two processes that average a gradient of {gradient['gradient bytes'] / 1e6:.0f} MB send "
        f"{gradient['sent bytes'] / 1e6:.1f} MB together, computed {computed / 1e6:.0f} MB. Computed: what each node "
        "sends in a step, and the efficiency of 64 nodes by network."
    )
    parts = [
        "## Object store",
        f"Measured; {CACHED_ROW_GROUPS} row groups stay in memory:",
        _reads_table(reads),
        "Computed, for a million samples:",
        _epoch_table(reads),
        "## Gradients",
        exchanged,
        _gradient_table(),
    ]
    return "\n\n".join(parts)


def _reads_table(reads: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            row["image"],
            f"{row['samples']}",
            f"{row['bytes a sample'] / 1e3:.0f} kB",
            f"{row['copy requests']} (of {row['files']} file{'s' if row['files'] > 1 else ''} and the manifest)",
            f"{row['copy bytes'] / 1e6:.1f} MB",
            f"{row['groups']}",
            f"{row['epoch requests']}",
            f"{_requests_by_rows(row['samples'], row['groups']):.0f}",
            f"{row['epoch bytes'] / 1e6:.1f} MB",
        ]
        for row in reads
    ]
    header = ["Image", "Samples", "A sample", "Copy: requests", "bytes", "Row groups", "An epoch by rows: requests"]
    return table([*header, "computed", "bytes"], rows)


def _requests_by_rows(samples: int, groups: int) -> float:
    """Requests for all samples in random order, if some row groups stay in memory, and each is read at least once."""
    return max(groups, samples * (1 - CACHED_ROW_GROUPS / groups))


def _epoch_table(reads: Sequence[dict[str, Any]]) -> str:
    """Computed: what each of some nodes reads for a million samples."""
    rows = []
    for row in reads:
        total = 1_000_000 * row["bytes a sample"]
        for nodes in NODES:
            rows.append(
                [
                    row["image"],
                    f"{nodes}",
                    f"{-(-total // SHARD_BYTES):,.0f}",
                    f"{total / 1e9:,.0f} GB",
                    f"{1_000_000 / nodes:,.0f}",
                    f"{1_000_000 / nodes * max(ROW_GROUP_BYTES, row['bytes a sample']) / 1e9:,.0f} GB",
                ]
            )
    header = ["Image", "Nodes", "Copy: requests of a node, once", "bytes", "By rows: requests of a node, each epoch"]
    return table([*header, "bytes"], rows)


def _gradient_table() -> str:
    """Computed: bytes of a step on each node's network, and the efficiency with various networks."""
    rows = []
    for name in RECIPES:
        inputs = check_inputs(FINETUNE_INPUTS, {**read_recipe(name), "data_uri": "any"})
        settings, devices = planned(inputs), hardware_of(name).devices
        recipe = settings.recipe
        model = published_model(name.partition("-")[0], settings.targets)
        samples = recipe.batch_size * recipe.accumulation_steps
        flops = samples * estimate_flops(model, recipe, [TOKENS], SLICES * 1024, settings.checkpointing)
        seconds = 3600 * expected_hours(model, flops, PEAK_FLOPS[REFERENCE_GPU])
        trained = model.trained(recipe)
        # ZeRO-2 sends gradients in bf16 to their owners, and the weights back; an average in float32 is twice as large.
        bytes_ = 2 * trained * (BF16 if settings.strategy.startswith("ZeRO") else FLOAT32)
        rows.append(
            [
                name,
                settings.strategy if devices > 1 else "DDP",
                f"{trained / 1e6:,.0f} M",
                *(f"{bytes_ * (nodes - 1) / nodes / 1e9:.2f} GB" for nodes in (2, 64)),
                f"{seconds:.1f} s",
                *(f"{_efficiency(seconds, bytes_ * 63 / 64, gigabits):.0%}" for gigabits in GIGABITS),
            ]
        )
    header = ["Recipe", "Strategy", "Trained", "2 nodes: a step", "64 nodes", "A step computes"]
    return table([*header, *(f"{gigabits} Gbit/s" for gigabits in GIGABITS)], rows)


def _efficiency(seconds: float, bytes_: float, gigabits: float) -> float:
    """Share of the time that computes, if sending waits for the end of the computation."""
    return seconds / (seconds + bytes_ / (gigabits * 1e9 / 8))


if __name__ == "__main__":
    main()
