import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import TrainingArguments
from minicpmv_finetune.components.train.callbacks import TrainingMonitor
from minicpmv_finetune.components.train.launch import WORKER, launch
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.components.train.watchdog import Watchdog
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.pipelines.demo import write_digits
from minicpmv_finetune.reports.training_record import read_record
from minicpmv_finetune.tracking.step_runs import StepRun
from tests.components.train import worker_with_fsdp
from tests.warm_processes import warm_processes


@pytest.fixture(scope="module", autouse=True)
def start_warm() -> Iterator[None]:
    """Let the trainings that a test starts by `launch` begin with the libraries imported."""
    with warm_processes():
        yield


@pytest.fixture(autouse=True)
def forget_deepspeed() -> Iterator[None]:
    """Let transformers forget DeepSpeed settings that a test has parsed; it keeps them until they are collected."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture(scope="session")
def shards(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty-four digits to train on and sixteen to evaluate, prepared for the tiny model."""
    folder = tmp_path_factory.mktemp("train")
    train, evaluation = write_digits(folder / "digits", seed=0, held_out=16)
    samples = json.loads(train.read_text())[:64]
    train.write_text(json.dumps(samples))
    return _prepared(folder, train, evaluation, tiny_46)


@pytest.fixture(scope="session")
def uneven_shards(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples of different lengths, and sixteen to evaluate, every other one without an image."""
    folder = tmp_path_factory.mktemp("uneven")
    train, evaluation = write_digits(folder / "digits", seed=0, held_out=16)
    for file, count, question in ((train, 40, "Count. "), (evaluation, 16, "Tell. ")):
        samples = json.loads(file.read_text())[:count]
        for number, sample in enumerate(samples):
            if number % 2:
                del sample["image"]
                sample["conversations"][0]["content"] = question * (1 + number % 5)
            sample["conversations"][1]["content"] += " Surely." * (number % 7)
        file.write_text(json.dumps(samples))
    return _prepared(folder, train, evaluation, tiny_46)


@pytest.fixture(scope="session")
def shared_shards(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two samples: four questions about each of eight digits."""
    folder = tmp_path_factory.mktemp("shared")
    train, evaluation = write_digits(folder / "digits", seed=0, held_out=16)
    samples = []
    for number, sample in enumerate(json.loads(train.read_text())[:8]):
        for question in range(4):
            copy = json.loads(json.dumps(sample)) | {"id": f"{number}-{question}"}
            copy["conversations"][0]["content"] = "<image>\nWhich digit is it?" + " Count." * question
            samples.append(copy)
    train.write_text(json.dumps(samples))
    return _prepared(folder, train, evaluation, tiny_46)


@pytest.fixture(scope="session")
def fine_shards(uneven_shards: Path, tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `uneven_shards` for a base whose tower does not merge patches; the base is beside them."""
    folder = tmp_path_factory.mktemp("fine")
    base = shutil.copytree(tiny_46, folder / "base")
    for file, part in (("config.json", ""), ("processor_config.json", "image_processor")):
        content = json.loads((base / file).read_text())
        (content[part] if part else content)["downsample_mode"] = "4x"
        (base / file).write_text(json.dumps(content))
    dataset = uneven_shards.parent / "dataset"
    preprocess(dataset, str(base), folder / "shards", folder / "more.jsonl", PreprocessSettings())
    return folder / "shards"


@pytest.fixture(scope="session")
def half_shards(uneven_shards: Path, tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`uneven_shards` again, with a base beside them whose weights are bf16, as published ones are."""
    folder = tmp_path_factory.mktemp("half")
    base = shutil.copytree(tiny_46, folder / "base")
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return shutil.copytree(uneven_shards, folder / "shards")


def _prepared(folder: Path, train: Path, evaluation: Path, base: Path) -> Path:
    validate_data(str(train), str(evaluation), folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    preprocess(folder / "dataset", str(base), folder / "shards", folder / "more.jsonl", PreprocessSettings())
    return folder / "shards"


class Training(NamedTuple):
    """A finished training.

    Attributes:
        folder: Its output folder.
        losses: The loss of each step.
        eval_losses: The loss of each evaluation.
    """

    folder: Path
    losses: list[float]
    eval_losses: list[float]


Train = Callable[..., Training]


@pytest.fixture(scope="session")
def train(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A function that trains on shards with some flags and processes, once for all tests that ask for the same run."""

    @cache
    def train(shards: Path, flags: str, processes: int = 1, worker: str = WORKER, run: int = 1) -> Training:
        folder = tmp_path_factory.mktemp("training") / "out"
        base = own if (own := shards.parent / "base").exists() else tiny_46
        paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            started = worker_with_fsdp.__name__ if "--strategy fsdp2" in flags else worker
            patch.setattr("minicpmv_finetune.components.train.launch.WORKER", started)
            launch([*paths, *flags.split(), "--logging_steps", "1"], processes)
        history = read_record(folder).history
        losses, eval_losses = ([entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss"))
        return Training(folder, losses, eval_losses)

    return train


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., MiniCPMVTrainer]:
    """A function that makes a trainer of a model, without data."""

    def make(model: nn.Module, **settings: Any) -> MiniCPMVTrainer:
        return MiniCPMVTrainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings),
            monitor=TrainingMonitor(StepRun(), [0] * 4),
            watchdog=Watchdog(100, 0),
            sample_ids=lambda rows: [str(row) for row in rows],
            lengths=[],
        )

    return make
