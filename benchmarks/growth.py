"""How time and memory of the steps grow with the number of samples.

    python benchmarks/growth.py [--samples 10000 100000 1000000] [--only steps partitions …]

The samples have synthetic images of 28 × 28 pixels, 10,000 in an archive. Each step runs in a process of its own; its
memory is what the process and its children use together, without the pages of files; shared pages are counted once. A
row for each measurement is appended to build/bench/growth.jsonl, with the date and the machine, and two rows about all
of them, with the goals as targets, are written as the other benchmarks write theirs.
"""

import argparse
import datetime
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from data import ANSWER, QUESTION, child_seconds, used_memory, write_checkpoint
from numpy.typing import NDArray
from pages import replace_part, table
from PIL import Image
from results import make_result, save_results

from minicpmv_finetune.components.preprocess.shard_tasks import SHARD_ROWS
from minicpmv_finetune.shards.format import MANIFEST_FILE, ShardReader, read_manifest, write_shard

RESULTS = Path("build/bench/growth.jsonl")
KEPT = Path("benchmarks/results/growth.jsonl")
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- written by benchmarks/growth.py -->", "<!-- end of what benchmarks/growth.py writes -->"
SIDE = 28
SAMPLES_OF_AN_ARCHIVE = 10_000
SECONDS_BETWEEN_LOOKS = 0.1
MEMORY = ("Pss_Anon:", "Pss_Shmem:")  # without the pages of files, such as libraries and shards, which can be dropped
BATCH = 8
FEW = 10_000  # further samples that do not show how much memory one takes
FEWEST_COMPARED = 1_000  # samples; with fewer, worker processes end almost at once, and a start-up is most of the time
ARRANGEMENTS = ("--group_by_length true", "--packing true", "--tokens_per_batch 2048", "--share_images true")
Row = dict[str, Any]

STEPS = {
    "validate-data": """
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
validate_data(f"{data}/train.jsonl", "", out / "dataset", out / "rejects.jsonl", ValidationSettings(), out / "d.html")
""",
    "preprocess": """
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
shards, cache = out / f"shards{place}", str(out / f"cache{place}")
preprocess(out / "dataset", base, shards, out / "more.jsonl", PreprocessSettings(), cache, report=out / "s.html")
""",
    "preprocess, one part": """
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess_partition
parts, part = map(int, place.split("/"))
preprocess_partition(out / "dataset", base, PreprocessSettings(), str(out / f"cache{parts}"), part, parts)
""",
    # A training up to its first batch, or to the first one after `place` batches, as after a resumption.
    "first batch": """
import os, time
from accelerate import skip_first_batches
from minicpmv_finetune.components.train import finetune, trainer

def first_batch(self, **options):
    started = time.monotonic()
    loader = self.get_train_dataloader()
    loader = skip_first_batches(loader, int(place)) if int(place) else loader
    rows = next(iter(loader))["rows"]
    print(json.dumps({"loader_s": round(time.monotonic() - started, 2), "rows": len(rows)}), flush=True)
    os._exit(0)

trainer.MiniCPMVTrainer.train = first_batch
finetune.main([
    "--data_path", str(out / "shards"), "--model_name_or_path", base, "--output_dir", str(out / "trained"),
    "--cache_dir", str(out / "training-cache"), "--use_lora", "true", "--tune_llm", "false",
    "--per_device_train_batch_size", batch, "--num_train_epochs", "1", "--report_to", "none", *flags.split(),
])
""",
    "train": """
from minicpmv_finetune.components.train import finetune
finetune.main([
    "--data_path", str(out / "shards"), "--model_name_or_path", base, "--output_dir", str(out / "trained"),
    "--cache_dir", str(out / "training-cache"), "--use_lora", "true", "--tune_llm", "false",
    "--per_device_train_batch_size", batch, "--num_train_epochs", "1", "--report_to", "none",
])
""",
    "merge": """
from minicpmv_finetune.components.merge.merge import MergeSettings, merge
merge(base, out / "trained", out / "shards", out / "merged", out / "merge.json", MergeSettings())
""",
    "evaluate": """
from minicpmv_finetune.components.evaluate.evaluate import evaluate
from minicpmv_finetune.components.evaluate.settings import EvaluationSettings
settings = EvaluationSettings(max_new_tokens=4)
evaluate(out / "merged", base, out / "dataset", out / "predictions.jsonl", out / "e.html", settings)
""",
    # What the step before had imported in its process at its end, and nothing else, long enough to be looked at.
    "libraries": """
import contextlib, importlib, time
for name in json.loads((out / "modules.json").read_text()):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
time.sleep(1)
""",
}
PROGRAM = """
import json, sys
from pathlib import Path
base, data, out, place, batch, flags = sys.argv[1:]
out = Path(out)
"""
AFTER = """
(out / "modules.json").write_text(json.dumps(list(sys.modules)))
"""
INTERPRETERS = {"merge": 2}
"""Processes that import the libraries, where they are no forks: the parity check is a program of its own."""


def main() -> None:
    """Run the experiments, and print and append what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000], help="numbers of samples")
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS), default=["steps", "partitions", "memory"])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench/growth"), help="folder for temporary files, 5 kB a sample"
    )
    parser.add_argument("--write", action="store_true", help="keep all results, and replace the tables of the page")
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    try:
        base = write_checkpoint(folder / "base", scale=112)
        for name in options.only:
            for row in EXPERIMENTS[name](folder, base, sorted(options.samples)):
                rows.append(keep(row))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(write_tables(rows))
    results = compare(rows)
    save_results(results)
    for result in results:
        print(json.dumps(result))
    if options.write:
        KEPT.write_text(RESULTS.read_text())
        replace_part(PAGE, BEGIN, END, f"\n{write_tables(read_rows(KEPT))}\n")


def keep(row: Row) -> Row:
    """Print a row, and append it to the results; returns it with the date and the machine."""
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load {load:.1f}"
    row = {**row, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(f"{json.dumps(row)}\n")
    print(json.dumps(row), flush=True)
    return row


def measure_steps(folder: Path, base: Path, counts: list[int]) -> Iterable[Row]:
    """Time and memory of validate-data, preprocess, and the start of a training, for each number of samples."""
    for count in counts:
        data, out = folder / f"data-{count}", folder / f"out-{count}"
        write_samples(data, count)
        out.mkdir()
        for step in ("validate-data", "preprocess"):
            yield {"step": step, "samples": count, **observe(step, base, data, out)}
        size = (out / "shards" / "manifest.json").stat().st_size
        manifest = read_manifest(out / "shards")
        yield {
            "step": "shards",
            "samples": count,
            "files": len(manifest.files),
            "bytes": manifest.bytes,
            "manifest": size,
        }
        yield {"step": "first batch after these", "samples": count, **observe("first batch", base, data, out, "0")}
        shutil.rmtree(data)
        shutil.rmtree(out)


def measure_starts(folder: Path, base: Path, counts: list[int]) -> Iterable[Row]:
    """The start of a training alone: its shards have the rows of a few samples many times, for larger numbers."""
    data, few = folder / "few", folder / "few-out"
    write_samples(data, 100)
    few.mkdir()
    for step in ("validate-data", "preprocess"):
        observe(step, base, data, few)
    for count in counts:
        out = folder / f"starts-{count}"
        repeat_rows(few / "shards", out / "shards", count)
        last = -(-count // BATCH) - 1
        # The first training also compares the shards' hashes, as each machine does once.
        for step, place in {"first training": 0, "first batch": 0, "last batch": last}.items():
            yield {"step": step, "samples": count, **observe("first batch", base, data, out, str(place))}
        for flags in ARRANGEMENTS:
            found = observe("first batch", base, data, out, "0", flags)
            yield {"step": f"first batch `{flags}`", "samples": count, **found}
        shutil.rmtree(out)


def repeat_rows(source: Path, target: Path, count: int) -> None:
    """Write shards that have the rows of other shards again and again."""
    target.mkdir(parents=True)
    manifest = read_manifest(source)
    rows = list(ShardReader(source, "train").stored_rows())
    lengths, shards = manifest.lengths["train"], []
    for number, first in enumerate(range(0, count, SHARD_ROWS)):
        chosen = (rows[place % len(rows)] for place in range(first, min(first + SHARD_ROWS, count)))
        shards.append(write_shard(target / f"train-{number:05d}.parquet", chosen))
    repeated = manifest.model_copy(
        update={
            "shards": {"train": shards, "eval": []},
            "lengths": {"train": [lengths[place % len(rows)] for place in range(count)], "eval": []},
            "bytes": sum(shard.bytes for shard in shards),
        }
    )
    (target / MANIFEST_FILE).write_text(repeated.model_dump_json())


def measure_partitions(folder: Path, base: Path, counts: list[int]) -> Iterable[Row]:
    """Time of each part of preprocess on 1, 2 and 4 pods, one after the other, and whether they write equal bytes."""
    count = min(counts[-1], 100_000)
    data, out = folder / "parts", folder / "parts-out"
    write_samples(data, count)
    out.mkdir()
    observe("validate-data", base, data, out)
    hashes = {}
    for parts in (1, 2, 4):
        found = [observe("preprocess, one part", base, data, out, f"{parts}/{part}") for part in range(parts)]
        end = observe("preprocess", base, data, out, str(parts))
        manifest = read_manifest(out / f"shards{parts}")
        hashes[parts] = [shard.sha256 for shard in manifest.files]
        yield {
            "step": "preprocess in parts",
            "samples": count,
            "parts": parts,
            "cpu_s": [one["cpu_s"] for one in found],
            "cpu_s of the end": end["cpu_s"],
            "peak_mb": max(one["peak_mb"] for one in found),
            "equal": hashes[parts] == hashes[1],
        }
    shutil.rmtree(data)
    shutil.rmtree(out)


def measure_alike(folder: Path, base: Path, counts: list[int]) -> Iterable[Row]:
    """Time of the search for near-equal images: all different, all copies, or alike without being copies."""
    for count in counts:
        for kind, most in {"different": 256, "copies": 2, "alike": 30}.items():
            yield from _search(kind, most, count)


def _search(kind: str, most: int, count: int) -> Iterable[Row]:
    from minicpmv_finetune.components.validate_data.duplicates import find_repeated
    from minicpmv_finetune.components.validate_data.inventory import Inventory
    from minicpmv_finetune.data.checking import AcceptedSample, InspectedImage
    from minicpmv_finetune.data.samples import ImageRef

    chance = np.random.default_rng(0)
    base = chance.integers(0, 225, (16, 16, 1)) if most < 256 else np.zeros((16, 16, 1), np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        with Inventory(Path(scratch)) as inventory:
            for number in range(count):
                pixels = (base + chance.integers(0, most, (16, 16, 1))).repeat(3, axis=2).astype(np.uint8)
                ref = ImageRef(uri=str(number), sha256=f"{number:064x}", width=16, height=16)
                image = InspectedImage(ref, pixels.tobytes(), ())
                inventory.add(AcceptedSample("{}", number.to_bytes(32), 2, (image,), frozenset()))
        started = time.process_time()
        _, counts = find_repeated(inventory, chance.random(count) < 0.1)
        seconds = time.process_time() - started
    yield {"step": f"near-equal images, {kind}", "samples": count, "seconds": round(seconds, 1), "found": dict(counts)}


def measure_memory(folder: Path, base: Path, counts: list[int]) -> Iterable[Row]:
    """Peak memory of whole steps with a tiny model and two numbers of samples, and of their libraries alone."""
    for count in (200, 2_000):
        data, out = folder / f"whole-{count}", folder / f"whole-out-{count}"
        write_samples(data, count)
        out.mkdir()
        for step in ("validate-data", "preprocess", "train", "merge", "evaluate"):
            found = observe(step, base, data, out)
            libraries = INTERPRETERS.get(step, 1) * observe("libraries", base, data, out)["peak_mb"]
            yield {"step": f"whole {step}", "samples": count, **found, "libraries_mb": libraries}
        shutil.rmtree(data)
        shutil.rmtree(out)


def observe(step: str, base: Path, data: Path, out: Path, place: str = "", flags: str = "") -> Row:
    """Run a step in a process of its own; returns its time, that of its processors, its memory, and what it printed."""
    command = [sys.executable, "-c", PROGRAM + STEPS[step] + AFTER, *map(str, (base, data, out, place, BATCH, flags))]
    started, peak, last, used = time.monotonic(), 0, 0, child_seconds()
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:  # noqa: S603
        while True:
            try:
                printed, _ = process.communicate(timeout=SECONDS_BETWEEN_LOOKS)
                break
            except subprocess.TimeoutExpired:
                # Two looks, because while a process forks one look may count its memory twice.
                now = used_memory(process.pid, MEMORY)
                peak, last = max(peak, min(last, now)), now
        seconds = time.monotonic() - started
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{step} ended with exit code {process.returncode}: {log.read()[-2000:].decode()}")
    found: Row = {}
    for line in printed.decode().splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    processor = child_seconds() - used
    return {"seconds": round(seconds, 1), "cpu_s": round(processor, 1), "peak_mb": round(peak / 1e6), **found}


def write_samples(folder: Path, count: int) -> None:
    """Write archives of small images, no two of them equal, and a sample for each image."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as samples:
        for first in range(0, count, SAMPLES_OF_AN_ARCHIVE):
            name = f"{first // SAMPLES_OF_AN_ARCHIVE:04d}.tar"
            with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as archive:
                for number in range(first, min(first + SAMPLES_OF_AN_ARCHIVE, count)):
                    content = _png(noise.integers(0, 256, (7, 7), dtype=np.uint8))
                    member = tarfile.TarInfo(f"{number}.png")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                    image = f"{name}!{member.name}"
                    sample = {"id": str(number), "image": image, "conversations": [QUESTION, ANSWER]}
                    samples.write(f"{json.dumps(sample)}\n")


def _png(pixels: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def compare(rows: Iterable[Row]) -> list[Row]:
    """The rows of the results: the step whose memory, and the one whose time, grew most with the samples."""
    memory, times = {}, {}
    for smaller, larger in _pairs(rows):
        if smaller["samples"] < FEWEST_COMPARED:
            continue
        name = f"{larger['step']} {smaller['samples']:,} → {larger['samples']:,}"
        memory[name] = larger["peak_mb"] / smaller["peak_mb"]
        times[name] = 10 * larger["cpu_s"] / smaller["cpu_s"] * smaller["samples"] / larger["samples"]
    if not memory:
        return []
    details = ["; ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()) for found in (memory, times)]
    return [
        make_result("growth_memory", max(memory.values()), 1.2, f"largest of {details[0]}", at_most=True),
        make_result("growth_time_for_10x", max(times.values()), 11.0, f"largest of {details[1]}", at_most=True),
    ]


def _pairs(rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """The latest rows of each step with one number of samples, and with the next larger one."""
    steps: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "peak_mb" in row and "parts" not in row:
            steps.setdefault(row["step"], {})[row["samples"]] = row
    for found in steps.values():
        yield from pairwise(sorted(found.values(), key=lambda row: row["samples"]))


def write_tables(rows: Sequence[Row]) -> str:
    """The tables of the page: growth from one number of samples to the next, memory and need, preprocess in parts."""
    of_steps, of_need = [], []
    for smaller, larger in _pairs(rows):
        samples = larger["samples"] - smaller["samples"]
        further = f"{max(larger['peak_mb'] - smaller['peak_mb'], 0) * 1e6 / samples:,.0f}" if samples > FEW else "–"
        pair = [f"{smaller[name]:,} → {larger[name]:,}" for name in ("samples", "cpu_s", "peak_mb")]
        of_steps.append([larger["step"], *pair, further, larger["date"], larger["machine"]])
        if "libraries_mb" in larger:
            libraries, peak = larger["libraries_mb"], larger["peak_mb"]
            of_need.append([larger["step"], f"{libraries:,}", f"{peak:,}", f"{peak / libraries:.2f}"])
    parts = {row["parts"]: row for row in rows if "parts" in row}
    in_parts = []
    for number, row in sorted(parts.items()):
        equal = "yes" if row["equal"] else "no"
        end, peak = f"{row['cpu_s of the end']}", f"{row['peak_mb']}"
        in_parts.append([f"{number}", f"{row['samples']:,}", f"{max(row['cpu_s'])}", end, peak, equal])
    of_a_step = ["Step", "Samples", "Processor seconds", "MB", "Bytes a further sample", "Date", "Machine"]
    of_memory = ["Step", "MB of its libraries", "MB at the peak", "Ratio"]
    of_parts = ["Parts", "Samples", "Processor seconds of the longest part", "of the end", "MB", "Bytes equal"]
    return "\n\n".join([table(of_a_step, of_steps), table(of_memory, of_need), table(of_parts, in_parts)])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()]


EXPERIMENTS: dict[str, Callable[[Path, Path, list[int]], Iterable[Row]]] = {
    "steps": measure_steps,
    "starts": measure_starts,
    "partitions": measure_partitions,
    "alike": measure_alike,
    "memory": measure_memory,
}

if __name__ == "__main__":
    main()
