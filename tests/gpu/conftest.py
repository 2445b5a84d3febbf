"""Claims that only a GPU can show; docs/gpu.md lists them. Without a GPU every test here is skipped.

`GPU_SUITE_ON_CPU=1` runs what a CPU can run of them, so that a mistake in a test is not found on a rented machine. What
is measured is appended to `build/bench/gpu.jsonl`.
"""

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.pipelines.demo import write_digits
from minicpmv_finetune.reports.training_record import read_record

RESULTS = Path(__file__).parents[2] / "build/bench/gpu.jsonl"
ON_CPU = os.environ.get("GPU_SUITE_ON_CPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available() and not (ON_CPU and "cuda_only" not in item.fixturenames):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.skip(reason="needs a GPU with CUDA"))


@pytest.fixture(scope="session")
def cuda_only() -> None:
    """Marks a test that has no meaning on a CPU."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that records what a test measured."""

    def record(**values: Any) -> None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        name = request.node.name
        with RESULTS.open("a") as file:
            file.write(json.dumps({"test": name, **values}) + "\n")

    return record


@pytest.fixture(scope="session")
def prepared(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A tiny checkpoint of a generation, and shards of 64 digits for it, 16 of them held out."""

    @lru_cache
    def prepare(version: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(version)
        train, held_out = write_digits(folder / "digits", seed=0, held_out=16)
        train.write_text(json.dumps(json.loads(train.read_text())[:64]))
        base = tiny(version)
        validate_data(str(train), str(held_out), folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
        preprocess(folder / "dataset", str(base), folder / "shards", folder / "more.jsonl", PreprocessSettings())
        return base, folder / "shards"

    return prepare


@pytest.fixture
def train(prepared: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Callable[..., list[float]]:
    """A function that trains as the command does, in one process on one device, and returns the loss of each step."""

    def run(version: str, flags: str, out: str = "out") -> list[float]:
        base, shards = prepared(version)
        paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(tmp_path / out)]
        launch([*paths, *flags.split(), "--logging_steps", "1", "--per_device_train_batch_size", "8"], 1)
        return [entry["loss"] for entry in read_record(tmp_path / out).history if "loss" in entry]

    return run
