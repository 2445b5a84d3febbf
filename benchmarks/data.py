"""How fast data becomes what the model takes, what shards cost and give back, in how much memory, how fast they move.

    python benchmarks/data.py [--only codecs transfer …]

What is compared alternates in one run, so that whatever else the machine does meets both. Single-threaded work is
measured in processor time, which a busy neighbour takes nothing of; the rest by the clock. The images are the two
photographs of scikit-learn, scaled to the sizes named; enlarged, they are smoother than a camera's.
"""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torchvision import transforms

from minicpmv_finetune import storage
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
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

RESULTS = Path("build/bench/data.jsonl")
SIZES = {"1344": (1344, 1344), "640": (640, 480)}
PATCH = 14
JPEG_QUALITY = 90
QUESTION = {"role": "user", "content": "<image>\nWhat is in the image?"}
ANSWER = {"role": "assistant", "content": "A building by the water, and trees behind it."}
Result = dict[str, Any]

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
    """Measure, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="some of them")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/data"), help="scratch, about 4 GB")
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
    print("Load of the machine over the last minutes:", ", ".join(f"{load:.1f}" for load in os.getloadavg()))


# From a file to the model's floats


def measure_preprocessing(folder: Path) -> list[Result]:
    """One core, from a JPEG file to the model's floats; published way against ours, then parts of ours."""
    config = SlicingConfig(patch_size=PATCH)
    results = []
    for name, size in SIZES.items():
        files = photographs(folder / "photographs", size)
        for file in files:
            for theirs, ours in zip(published(file, config), prepared(file, config), strict=True):
                assert torch.equal(theirs, ours)  # noqa: S101
        shards = folder / "one"
        shards.mkdir(exist_ok=True)

        def written(file: Path, shards: Path = shards) -> None:
            pixels = sliced(file, config)
            write_shard(shards / "part.parquet", [StoredRow(file.name, [0], [0], store_slices(pixels, "raw"))])

        ways: dict[str, Callable[[Path], object]] = {
            "published": lambda file: published(file, config),
            "floats": lambda file: prepared(file, config),
            "slices": lambda file: sliced(file, config),
            "shard": written,
        }
        times = alternate({way: lambda do=do, files=files: list(map(do, files)) for way, do in ways.items()}, rounds=15)
        rate = {way: len(files) / statistics.median(seconds) for way, seconds in times.items()}
        results.append(
            line(
                f"preprocess_vs_published_{name}",
                rate["floats"] / rate["published"],
                2.0,
                f"{rate['floats']:.0f} against {rate['published']:.0f} images/s a core from a JPEG of "
                f"{size[0]}×{size[1]} to equal float tensors (torch.equal); up to uint8 slices {rate['slices']:.0f}, "
                f"and written to a raw shard {rate['shard']:.0f}",
            )
        )
    return results


def published(path: Path, config: SlicingConfig) -> list[torch.Tensor]:
    """The way of the published dataset class: each slice is cropped, made a tensor and normalized by torchvision."""
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    image = Image.open(path).convert("RGB")
    plan = plan_slices(*image.size, config)
    pieces = [image.resize(plan.overview, Image.Resampling.BICUBIC)]
    if plan.refined and plan.grid and plan.slice_size:
        whole = image.resize(plan.refined, Image.Resampling.BICUBIC)
        width, height = plan.slice_size
        pieces += [
            whole.crop((left, top, left + width, top + height))
            for top in range(0, plan.refined[1], height)
            for left in range(0, plan.refined[0], width)
        ]
    return [lay_out(convert(piece)) for piece in pieces]


def lay_out(image: torch.Tensor) -> torch.Tensor:
    """The patches of [3, height, width] side by side, [3, patch, patches * patch]."""
    columns = torch.nn.functional.unfold(image[None], PATCH, stride=PATCH)[0]
    return columns.view(3, PATCH, PATCH, -1).transpose(2, 3).reshape(3, PATCH, -1)


def sliced(path: Path, config: SlicingConfig) -> list[np.ndarray]:
    """Our way to uint8 slices."""
    image = decode_image(path.read_bytes())
    return cut_slices(image, plan_slices(*image.size, config), config)


def prepared(path: Path, config: SlicingConfig) -> list[torch.Tensor]:
    """Our way to floats."""
    return [pack_patches(pixels, PATCH, config.resampler) for pixels in sliced(path, config)]


# Shards


def measure_codecs(folder: Path) -> list[Result]:
    """What each codec costs and gives back, against slicing on the fly."""
    base = checkpoint(folder / "base")
    encoder = Encoder.from_checkpoint(base, 9)
    results = []
    for name, size in SIZES.items():
        dataset = make_dataset(folder / f"codecs-{name}", size, samples=16)
        samples = list(read_samples(dataset, "train"))
        readers, writing = {}, {}
        for codec in CODECS:
            started = time.process_time() + children()
            shards = folder / f"shards-{name}-{codec}"
            settings = PreprocessSettings(codec=codec, model_max_length=4096)
            preprocess(dataset, str(base), shards, folder / "r.jsonl", settings, str(folder / "cache"), num_workers=1)
            writing[codec] = time.process_time() + children() - started
            readers[codec] = ShardReader(shards, "train")
            for row, sample in zip(readers[codec], samples, strict=True):
                assert same_pixels(row, prepare(sample, encoder, 4096))  # noqa: S101
        order = random.Random(0).sample(range(len(samples)), len(samples))  # noqa: S311
        ways: dict[str, Callable[[], object]] = {
            codec: lambda reader=reader, order=order: [reader[number] for number in order]
            for codec, reader in readers.items()
        }
        shuffled = [samples[number] for number in order]
        ways["on the fly"] = lambda shuffled=shuffled: [prepare(sample, encoder, 4096) for sample in shuffled]
        times = alternate(ways, rounds=7)
        rate = {way: len(samples) / statistics.median(seconds) for way, seconds in times.items()}
        for codec in sorted(CODECS, key=lambda codec: codec != "raw"):
            size_of_one = readers[codec].manifest.bytes / len(samples)
            is_promise = codec == "raw" and name == "1344"
            results.append(
                line(
                    "shards_vs_on_the_fly" if is_promise else f"shards_{codec}_vs_on_the_fly_{name}",
                    rate[codec] / rate["on the fly"],
                    10.0 if is_promise else None,
                    f"{codec}, JPEG of {size[0]}×{size[1]}: {rate[codec]:.0f} against {rate['on the fly']:.0f} rows/s "
                    f"a core, {size_of_one / 1e3:,.0f} kB a sample ({size_of_one / 1e4:,.1f} GB per 100,000), "
                    f"prepared in {1e3 * writing[codec] / len(samples):.0f} ms each",
                )
            )
    return results


def measure_workers(folder: Path) -> list[Result]:
    """Two processes against one, by the clock, the whole step."""
    base = checkpoint(folder / "base")
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
    for codec in ("raw", "webp-lossless"):
        ways = {str(workers): lambda workers=workers, codec=codec: run(workers, codec) for workers in (1, 2)}
        times = alternate(ways, rounds=2, clock=time.monotonic)
        one, two = (min(times[str(workers)]) for workers in (1, 2))
        is_promise = codec == "raw"
        results.append(
            line(
                "preprocess_two_workers" if is_promise else f"preprocess_two_workers_{codec}",
                one / two,
                1.8 if is_promise else None,
                f"800 images of 640×480 to {codec} shards, best of 2: {one:.1f} s by one process, {two:.1f} s by two",
            )
        )
    return results


def measure_growth(folder: Path) -> list[Result]:
    """Ten times the samples: the most memory at once and the time of validate-data and preprocess."""
    base = checkpoint(folder / "base", scale=112)
    seconds, memory = {}, {}
    for count in (10_000, 100_000):
        data = small_samples(folder / f"small-{count}", count)
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
        line("memory_100k_vs_10k", grown[worst], 1.2, f"most memory of all processes at once: {peaks}", at_most=True),
        line(
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
    """1 GB of shards to a real S3 server and back, against rclone."""
    source = folder / "source"
    source.mkdir()
    shards = []
    for number in range(8):
        content = os.urandom(128 * 2**20)
        name = f"train-{number:05d}.parquet"
        (source / name).write_bytes(content)
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
    (source / MANIFEST_FILE).write_text(manifest.model_dump_json())
    with s3_server(folder / "server") as remote:

        def fresh(target: Path) -> str:
            shutil.rmtree(target, ignore_errors=True)
            return str(target)

        def upload() -> None:
            with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
                list(pool.map(lambda path: storage.upload_file(path, f"s3://ours/{path.name}"), source.iterdir()))

        def download() -> None:
            open_shards("s3://ours", Path(fresh(folder / "copy")))

        def rclone(*arguments: str) -> None:
            command = [Path(sys.executable).with_name("rclone"), "copy", "--ignore-times", *arguments]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # noqa: S603

        up = {"ours": upload, "rclone": lambda: rclone(str(source), f"{remote}theirs")}
        # The same objects, not touched in between: this server hashes what is new when it is first asked for.
        down = {"ours": download, "rclone": lambda: rclone(f"{remote}ours", fresh(folder / "theirs"))}
        times = {"up": alternate(up, rounds=5, clock=time.monotonic)}
        times["down"] = alternate(down, rounds=5, clock=time.monotonic)
    shutil.rmtree(source)
    results = []
    for direction in ("up", "down"):
        ours, theirs = (statistics.median(times[direction][who]) for who in ("ours", "rclone"))
        results.append(
            line(
                f"s3_{direction}load_vs_rclone",
                theirs / ours,
                0.8,
                f"{manifest.bytes / 1e9:.2f} GB in {len(shards)} files, medians of 5: {ours:.2f} s "
                f"({manifest.bytes / ours / 1e6:.0f} MB/s{', sha256 compared' if direction == 'down' else ''}), "
                f"rclone copy {theirs:.2f} s; client and server share this machine",
            )
        )
    return results


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A real S3 server here, which the environment leads to; yields how rclone names it."""
    folder.mkdir()
    for bucket in ("ours", "theirs"):
        (folder / bucket).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, secret = "benchmark", "benchmark-secret"
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", str(folder)]
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


# What the experiments share


def photographs(folder: Path, size: tuple[int, int]) -> list[Path]:
    """The photographs in a size, as JPEG files."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, pixels in enumerate(load_sample_images().images):
        files.append(folder / f"{number}-{size[0]}.jpg")
        Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(files[-1], quality=JPEG_QUALITY)
    return files


def make_dataset(folder: Path, size: tuple[int, int], samples: int) -> Path:
    """A validated dataset of photographs, each file a little different."""
    folder.mkdir()
    contents = [path.read_bytes() for path in photographs(folder / "photographs", size)]
    rows = []
    for number in range(samples):
        # Behind the end of a JPEG's image nothing is read, but the file is another.
        (folder / f"{number}.jpg").write_bytes(contents[number % len(contents)] + number.to_bytes(4, "big"))
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": [QUESTION, ANSWER]})
    (folder / "train.json").write_text(json.dumps(rows))
    settings = ValidationSettings(eval_fraction=0.0)
    validate_data(str(folder / "train.json"), "", folder / "dataset", folder / "rejects.jsonl", settings)
    return folder / "dataset"


def small_samples(folder: Path, count: int) -> Path:
    """Small images, no two alike."""
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


def checkpoint(folder: Path, scale: int = 448) -> Path:
    """A tiny MiniCPM-V 4.6 that slices as the published one does."""
    shutil.rmtree(folder, ignore_errors=True)
    write_tiny_checkpoint(folder, corpus=DEMO_CORPUS)
    for path in folder.glob("*processor_config.json"):
        path.write_text(path.read_text().replace('"scale_resolution": 112', f'"scale_resolution": {scale}'))
    return folder


def same_pixels(one: ModelInput, other: ModelInput) -> bool:
    """Whether two rows hold equal slices."""
    return len(one.slices) == len(other.slices) and all(map(np.array_equal, one.slices, other.slices))


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds that each way took, round by round and in turning order, after a round that is not counted."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, do in list(ways.items())[:: -1 if number % 2 else 1]:
            if clock is time.monotonic:
                os.sync()  # what one wrote must not wait for the other's disk time
            started = clock()
            do()
            if number:
                times[way].append(clock() - started)
    return times


def observe(arguments: list[str]) -> tuple[float, int]:
    """Run a step in a process of its own; returns its seconds and the most memory of it and its children at once."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", STEP, *arguments], stderr=subprocess.DEVNULL) as process:  # noqa: S603
        most = 0
        ended = threading.Event()

        def watch() -> None:
            nonlocal most
            while not ended.wait(0.05):
                most = max(most, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    if code:
        raise SystemExit(f"{arguments[-1]} ended with exit code {code}")
    return time.monotonic() - started, most


def memory_of(process: int) -> int:
    """Bytes of a process and its children, shared ones counted once."""
    total = 0
    with suppress(OSError, ValueError):
        for text in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if text.startswith("Pss:"):
                total = int(text.split()[1]) * 1024
    with suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += memory_of(int(child))
    return total


def children() -> float:
    """Processor time of ended child processes."""
    used = os.times()
    return used.children_user + used.children_system


def line(name: str, ratio: float, target: float | None, detail: str, at_most: bool = False) -> Result:
    """A result; without a target there is nothing to hold."""
    holds = target is None or (ratio <= target if at_most else ratio >= target)
    return {"name": name, "ratio": round(ratio, 3), "target": target, "holds": holds, "detail": detail}


EXPERIMENTS: dict[str, Callable[[Path], list[Result]]] = {
    "preprocessing": measure_preprocessing,
    "codecs": measure_codecs,
    "workers": measure_workers,
    "growth": measure_growth,
    "transfer": measure_transfer,
}

if __name__ == "__main__":
    main()
