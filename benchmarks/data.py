"""Speed and memory of preparing data: slicing images, writing and reading shards, and transferring them.

    python benchmarks/data.py [--only codecs transfer …]

Compared variants alternate in one run, so that other load on the machine affects all of them. Single-threaded work is
measured in processor time, which other processes do not change; everything else in wall-clock time. The images are the
two photographs of scikit-learn, scaled to the named sizes; enlarged, they are smoother than photographs of a camera.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from results import make_result
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torchvision import transforms

from minicpmv_finetune import storage
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.cpu_memory import keep_freed_memory
from minicpmv_finetune.data.samples import decode_image, read_samples
from minicpmv_finetune.minicpmv.batch import pack_patches
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import SlicingConfig, cut_slices, plan_slices
from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
from minicpmv_finetune.pipelines.demo import DEMO_CORPUS
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.codecs import CODECS, Codec, store_slices
from minicpmv_finetune.shards.encoding import prepare
from minicpmv_finetune.shards.format import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    ShardReader,
    StoredRow,
    slicing_fields,
    write_shard,
)
from minicpmv_finetune.workers import KEPT_MEMORY

RESULTS = Path("build/bench/data.jsonl")
SIZES = {"1344": (1344, 1344), "640": (640, 480)}
PATCH = 14
JPEG_QUALITY = 90
QUESTION = {"role": "user", "content": "<image>\nWhat is in the image?"}
RCLONE = str(Path(sys.executable).with_name("rclone"))
ANSWER = {"role": "assistant", "content": "A building by the water, and trees behind it."}
Result = dict[str, Any]
Item = TypeVar("Item")

STEP = """
import sys
from pathlib import Path
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
data, base, out = map(Path, sys.argv[1:4])
if sys.argv[4] == "validate":
    validate_data(str(data), "", out / "dataset", out / "rejects.jsonl", ValidationSettings())
else:
    preprocess(out / "dataset", str(base), out / "shards", out / "more.jsonl", PreprocessSettings())
"""


def main() -> None:
    """Run the experiments, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="names of the experiments to run"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench/data"), help="folder for temporary files, about 4 GB"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    results: list[Result] = []
    try:
        for name in options.only:
            print(f"{name} …", file=sys.stderr)
            results += EXPERIMENTS[name](options.folder.absolute())
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in results))
    table = Table()
    for column in ("experiment", "ratio", "target", "holds", "detail"):
        table.add_column(column, no_wrap=column == "experiment")
    for row in results:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in row))
    Console().print(table)
    print("Load average over the last 1, 5 and 15 minutes:", ", ".join(f"{load:.1f}" for load in os.getloadavg()))


# From an image file to the model's float tensors


def measure_preprocessing(folder: Path) -> list[Result]:
    """Speed from a JPEG file to float tensors on one core: the published code, this project, and parts of it."""
    config = SlicingConfig(patch_size=PATCH)
    results = []
    photographs = {name: write_photographs(folder / "photographs", size) for name, size in SIZES.items()}
    for name, size in SIZES.items():
        files = photographs[name] * 10  # a worker too has its code and memory in the cache
        shards = folder / "one"
        shards.mkdir(exist_ok=True)

        def slice_to_shard(file: Path, shards: Path = shards) -> None:
            pixels = slice_to_bytes(file, config)
            write_shard(shards / "part.parquet", [StoredRow(file.name, [0], [0], store_slices(pixels, "raw"))])

        ways: dict[str, Callable[[Path], object]] = {
            "published": lambda file: slice_as_published(file, config),
            "floats": lambda file: slice_to_floats(file, config),
            "slices": lambda file: slice_to_bytes(file, config),
            "shard": slice_to_shard,
        }
        with ExitStack() as processes:
            times = alternate(
                {
                    way: processes.enter_context(
                        own_process(partial(call_for_each, files, do), as_worker=way != "published")
                    )
                    for way, do in ways.items()
                },
                rounds=15,
            )
        rate = {way: len(files) / statistics.median(seconds) for way, seconds in times.items()}
        results.append(
            make_result(
                f"preprocess_vs_published_{name}",
                rate["floats"] / rate["published"],
                3.0,
                f"{rate['floats']:.0f} against {rate['published']:.0f} images/s per core from a JPEG of "
                f"{size[0]}×{size[1]} to equal float tensors (torch.equal); to uint8 slices {rate['slices']:.0f}, "
                f"to a raw shard {rate['shard']:.0f}",
            )
        )
    for file in (file for files in photographs.values() for file in files):
        for expected, actual in zip(slice_as_published(file, config), slice_to_floats(file, config), strict=True):
            assert torch.equal(expected, actual)  # noqa: S101
    return results


def slice_as_published(path: Path, config: SlicingConfig) -> list[torch.Tensor]:
    """Slice as the published dataset class does: torchvision converts and normalizes each cropped slice."""
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    image = Image.open(path).convert("RGB")
    plan = plan_slices(*image.size, config)
    pieces = [image.resize(plan.overview, Image.Resampling.BICUBIC)]
    if plan.refined and plan.grid and plan.slice_size:
        refined = image.resize(plan.refined, Image.Resampling.BICUBIC)
        width, height = plan.slice_size
        pieces += [
            refined.crop((left, top, left + width, top + height))
            for top in range(0, plan.refined[1], height)
            for left in range(0, plan.refined[0], width)
        ]
    return [flatten_patches(convert(piece)) for piece in pieces]


def flatten_patches(image: torch.Tensor) -> torch.Tensor:
    """The patches of [3, height, width] side by side, [3, patch, patches * patch]."""
    columns = torch.nn.functional.unfold(image[None], PATCH, stride=PATCH)[0]
    return columns.view(3, PATCH, PATCH, -1).transpose(2, 3).reshape(3, PATCH, -1)


def slice_to_bytes(path: Path, config: SlicingConfig) -> list[np.ndarray]:
    """Slice as this project does, to uint8 arrays."""
    image = decode_image(path.read_bytes())
    return cut_slices(image, plan_slices(*image.size, config), config)


def slice_to_floats(path: Path, config: SlicingConfig) -> list[torch.Tensor]:
    """Slice as this project does, to float tensors."""
    slices = slice_to_bytes(path, config)
    packed = pack_patches(slices, PATCH, config.resampler)
    return list(packed.split([pixels.shape[0] // PATCH * pixels.shape[1] for pixels in slices], dim=-1))


# Shards


def measure_codecs(folder: Path) -> list[Result]:
    """Reading speed and size of shards with each codec, against slicing during training (on the fly)."""
    base = write_checkpoint(folder / "base")
    encoder = Encoder.from_checkpoint(base, 9)
    results = []
    for name, size in SIZES.items():
        dataset = make_dataset(folder / f"codecs-{name}", size, samples=16)
        samples = list(read_samples(dataset, "train"))
        readers: dict[Codec, ShardReader] = {}
        writing: dict[Codec, float] = {}
        for codec in CODECS:
            started = time.process_time() + child_seconds()
            shards = folder / f"shards-{name}-{codec}"
            settings = PreprocessSettings(codec=codec, model_max_length=4096)
            preprocess(dataset, str(base), shards, folder / "r.jsonl", settings, str(folder / "cache"), num_workers=1)
            writing[codec] = time.process_time() + child_seconds() - started
            readers[codec] = ShardReader(shards, "train")
            for row, sample in zip(readers[codec], samples, strict=True):
                assert same_pixels(row, prepare(sample, encoder, 4096))  # noqa: S101
        order = random.Random(0).sample(range(len(samples)), len(samples))  # noqa: S311
        ways: dict[str, Callable[[], object]] = {
            codec: partial(call_for_each, order, reader.__getitem__) for codec, reader in readers.items()
        }
        shuffled = [samples[number] for number in order]
        ways["on the fly"] = partial(call_for_each, shuffled, lambda sample: prepare(sample, encoder, 4096))
        times = alternate(ways, rounds=7)
        rate = {way: len(samples) / statistics.median(seconds) for way, seconds in times.items()}
        for codec in sorted(CODECS, key=lambda codec: codec != "raw"):
            sample_bytes = readers[codec].manifest.bytes / len(samples)
            has_target = codec == "raw" and name == "1344"
            results.append(
                make_result(
                    "shards_vs_on_the_fly" if has_target else f"shards_{codec}_vs_on_the_fly_{name}",
                    rate[codec] / rate["on the fly"],
                    10.0 if has_target else None,
                    f"{codec}, JPEG of {size[0]}×{size[1]}: {rate[codec]:.0f} against {rate['on the fly']:.0f} rows/s "
                    f"per core, {sample_bytes / 1e3:,.0f} kB per sample ({sample_bytes / 1e4:,.1f} GB per 100,000), "
                    f"preprocessed in {1e3 * writing[codec] / len(samples):.0f} ms per sample",
                )
            )
    return results


def measure_workers(folder: Path) -> list[Result]:
    """Wall-clock time of the preprocess step with one and with two processes."""
    base = write_checkpoint(folder / "base")
    dataset = make_dataset(folder / "workers", SIZES["640"], samples=800)
    number = 0

    def run(workers: int, codec: Codec) -> None:
        nonlocal number
        number += 1
        out = folder / f"run-{number}"
        settings = PreprocessSettings(codec=codec, model_max_length=4096)
        preprocess(dataset, str(base), out / "shards", out / "r.jsonl", settings, str(out / "cache"), workers)
        shutil.rmtree(out)

    results = []
    codecs: tuple[Codec, ...] = ("raw", "webp-lossless")
    for codec in codecs:
        ways = {str(workers): partial(run, workers, codec) for workers in (1, 2)}
        times = alternate(ways, rounds=2, clock=time.monotonic)
        one, two = (min(times[str(workers)]) for workers in (1, 2))
        has_target = codec == "raw"
        results.append(
            make_result(
                "preprocess_two_workers" if has_target else f"preprocess_two_workers_{codec}",
                one / two,
                1.8 if has_target else None,
                f"800 images of 640×480 to {codec} shards, best of 2: {one:.1f} s by one process, {two:.1f} s by two",
            )
        )
    return results


def measure_growth(folder: Path) -> list[Result]:
    """Peak memory and time of validate-data and preprocess with 10,000 and 100,000 samples."""
    base = write_checkpoint(folder / "base", scale=112)
    seconds, memory = {}, {}
    for count in (10_000, 100_000):
        data = write_small_samples(folder / f"small-{count}", count)
        out = folder / f"grown-{count}"
        for step in ("validate", "preprocess"):
            seconds[count, step], memory[count, step] = observe([str(data), str(base), str(out), step])
        shutil.rmtree(out)
        shutil.rmtree(data.parent)
    grown = {step: memory[100_000, step] / memory[10_000, step] for step in ("validate", "preprocess")}
    worst = max(grown, key=lambda step: grown[step])
    total = {count: seconds[count, "validate"] + seconds[count, "preprocess"] for count in (10_000, 100_000)}
    peaks = "; ".join(
        f"{step} {memory[10_000, step] / 1e6:.0f} MB at 10,000, {memory[100_000, step] / 1e6:.0f} MB at 100,000"
        for step in grown
    )
    return [
        make_result(
            "memory_100k_vs_10k", grown[worst], 1.2, f"peak memory of all processes together: {peaks}", at_most=True
        ),
        make_result(
            "time_100k_vs_10k",
            total[100_000] / total[10_000],
            11.0,
            f"validate-data and preprocess: {total[10_000]:.0f} s and {total[100_000]:.0f} s "
            f"({100_000 / total[100_000]:.0f} samples/s)",
            at_most=True,
        ),
    ]


# Object storage


def measure_transfer(folder: Path) -> list[Result]:
    """Time to upload and download 1 GB of shards, with an S3 server on this machine, against rclone."""
    source = folder / "source"
    manifest = write_random_shards(source)
    with s3_server(folder / "server") as remote:

        def empty_folder(target: Path) -> str:
            shutil.rmtree(target, ignore_errors=True)
            return str(target)

        def upload() -> None:
            with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
                list(pool.map(lambda path: storage.upload_file(path, f"s3://ours/{path.name}"), source.iterdir()))

        def download() -> None:
            open_shards("s3://ours", Path(empty_folder(folder / "copy")))

        def rclone(*arguments: str) -> None:
            subprocess.run([RCLONE, "copy", "--ignore-times", *arguments], check=True, stderr=subprocess.DEVNULL)  # noqa: S603

        up = {"ours": upload, "rclone": lambda: rclone(str(source), f"{remote}theirs")}
        # Both download the same unchanged objects: this server computes the hash of a new object at its first request.
        down = {"ours": download, "rclone": lambda: rclone(f"{remote}ours", empty_folder(folder / "theirs"))}
        times = {"up": alternate(up, rounds=5, clock=time.monotonic)}
        times["down"] = alternate(down, rounds=5, clock=time.monotonic)
    shutil.rmtree(source)
    results = []
    for direction in ("up", "down"):
        ours, theirs = (statistics.median(times[direction][tool]) for tool in ("ours", "rclone"))
        results.append(
            make_result(
                f"s3_{direction}load_vs_rclone",
                theirs / ours,
                0.8,
                f"{manifest.bytes / 1e9:.2f} GB in {len(manifest.files)} files, medians of 5: {ours:.2f} s "
                f"({manifest.bytes / ours / 1e6:.0f} MB/s{', sha256 compared' if direction == 'down' else ''}), "
                f"rclone copy {theirs:.2f} s; client and server share this machine",
            )
        )
    return results


def write_random_shards(folder: Path) -> Manifest:
    """Write 1 GB of files that look like shards to everything that only transfers them."""
    folder.mkdir()
    shards = []
    for number in range(8):
        content = os.urandom(128 * 2**20)
        name = f"train-{number:05d}.parquet"
        (folder / name).write_bytes(content)
        shards.append(Shard(file=name, rows=1, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        generation="4.6",
        tokenizer_sha256="",
        max_slice_nums=9,
        model_max_length=2048,
        patch_size=PATCH,
        pad_token_id=0,
        codec="raw",
        slicing=slicing_fields(SlicingConfig()),
        data_fingerprint="",
        key="benchmark",
        shards={"train": shards},
        lengths={"train": [1] * len(shards)},
        slices={"train": 0},
        bytes=sum(shard.bytes for shard in shards),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return manifest


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run an S3 server and set the environment for it; yields the name of the server for rclone."""
    folder.mkdir()
    for bucket in ("ours", "theirs"):
        (folder / bucket).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, secret = "benchmark", "benchmark-secret"
    command = [RCLONE, "serve", "s3", str(folder)]
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL) as server:  # noqa: S603
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        os.environ.update(
            AWS_ENDPOINT_URL=address,
            AWS_ACCESS_KEY_ID=key,
            AWS_SECRET_ACCESS_KEY=secret,
            AWS_DEFAULT_REGION="us-east-1",
        )
        try:
            yield f":s3,provider=Other,access_key_id={key},secret_access_key={secret},endpoint='{address}':"
        finally:
            server.terminate()


# Shared by the experiments


def write_photographs(folder: Path, size: tuple[int, int]) -> list[Path]:
    """Write the photographs of scikit-learn in the given size as JPEG files; returns their paths."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, pixels in enumerate(load_sample_images().images):
        files.append(folder / f"{number}-{size[0]}.jpg")
        Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(files[-1], quality=JPEG_QUALITY)
    return files


def make_dataset(folder: Path, size: tuple[int, int], samples: int) -> Path:
    """A validated dataset of photographs; no two files are identical."""
    folder.mkdir()
    contents = [path.read_bytes() for path in write_photographs(folder / "photographs", size)]
    rows = []
    for number in range(samples):
        # Bytes behind the end of a JPEG's image are ignored, but make each file a different one.
        (folder / f"{number}.jpg").write_bytes(contents[number % len(contents)] + number.to_bytes(4, "big"))
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": [QUESTION, ANSWER]})
    (folder / "train.json").write_text(json.dumps(rows))
    settings = ValidationSettings(eval_fraction=0.0)
    validate_data(str(folder / "train.json"), "", folder / "dataset", folder / "rejects.jsonl", settings)
    return folder / "dataset"


def write_small_samples(folder: Path, count: int) -> Path:
    """Write small images, no two of them identical, and their samples; returns the path of the samples."""
    folder.mkdir()
    rows = []
    noise = np.random.default_rng(0)
    for number in range(count):
        encoded = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (12, 12), dtype=np.uint8)).resize((56, 56)).save(encoded, "PNG")
        (folder / f"{number}.png").write_bytes(encoded.getvalue())
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": [QUESTION, ANSWER]})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def write_checkpoint(folder: Path, scale: int = 448) -> Path:
    """Write a tiny MiniCPM-V 4.6 that slices images as the published model does."""
    shutil.rmtree(folder, ignore_errors=True)
    write_tiny_checkpoint(folder, corpus=DEMO_CORPUS)
    for path in folder.glob("*processor_config.json"):
        path.write_text(path.read_text().replace('"scale_resolution": 112', f'"scale_resolution": {scale}'))
    return folder


def same_pixels(one: ModelInput, other: ModelInput) -> bool:
    """Whether two samples have equal slices."""
    return len(one.slices) == len(other.slices) and all(map(np.array_equal, one.slices, other.slices))


def call_for_each(items: Sequence[Item], function: Callable[[Item], object]) -> None:
    """Call a function for each item."""
    for item in items:
        function(item)


def alternate(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a warm-up round; the order of the ways is reversed every round.

    A way may return its seconds itself.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, do in list(ways.items())[:: -1 if number % 2 else 1]:
            if clock is time.monotonic:
                os.sync()  # so that one way does not pay for the writes of the one before
            started = clock()
            measured = do()
            if number:
                times[way].append(measured if isinstance(measured, float) else clock() - started)
    return times


@contextmanager
def own_process(do: Callable[[], object], as_worker: bool) -> Iterator[Callable[[], float]]:
    """Give a function that lets a process of its own do something, and returns the seconds of that process.

    The process may keep freed memory as a worker of preprocess does, which is part of how fast this project is. In one
    process, the large arrays that one way frees let glibc keep memory for the other way: the published code then took
    45 instead of 51 ms for an image of 1344 × 1344, the fastest of 12.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def serve() -> None:
        here.close()
        if as_worker:
            keep_freed_memory(KEPT_MEMORY)
        with suppress(EOFError):
            while True:
                there.recv()
                started = time.process_time()
                do()
                there.send(time.process_time() - started)

    process = context.Process(target=serve)
    process.start()
    there.close()

    def ask() -> float:
        here.send(None)
        seconds: float = here.recv()
        return seconds

    try:
        yield ask
    finally:
        here.close()
        process.join()


def observe(arguments: list[str]) -> tuple[float, int]:
    """Run a step in a separate process; returns its seconds and the peak memory of the process and its children."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", STEP, *arguments], stderr=subprocess.DEVNULL) as process:  # noqa: S603
        peak = 0
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.05):
                peak = max(peak, used_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    if code:
        raise SystemExit(f"{arguments[-1]} ended with exit code {code}")
    return time.monotonic() - started, peak


def used_memory(process: int, kinds: tuple[str, ...] = ("Pss:",)) -> int:
    """Bytes in use by a process and its children; what they share is counted once.

    Args:
        process: Number of the process.
        kinds: Fields of /proc/…/smaps_rollup. `Pss` has a share of the libraries' pages, which is smaller while other
            programs use the same libraries.
    """
    total = 0
    with suppress(OSError, ValueError):
        for text in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if text.startswith(kinds):
                total += int(text.split()[1]) * 1024
    with suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += used_memory(int(child), kinds)
    return total


def child_seconds() -> float:
    """Processor time of the child processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


EXPERIMENTS: dict[str, Callable[[Path], list[Result]]] = {
    "preprocessing": measure_preprocessing,
    "codecs": measure_codecs,
    "workers": measure_workers,
    "growth": measure_growth,
    "transfer": measure_transfer,
}

if __name__ == "__main__":
    main()
