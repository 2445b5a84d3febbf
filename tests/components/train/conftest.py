import json
from pathlib import Path

import pytest

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.pipelines.demo import write_digits


@pytest.fixture(scope="session")
def shards(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty-four digits to train on and sixteen to evaluate, prepared for the tiny model."""
    folder = tmp_path_factory.mktemp("train")
    train, evaluation = write_digits(folder / "digits", seed=0, held_out=16)
    samples = json.loads(train.read_text())[:64]
    train.write_text(json.dumps(samples))
    validate_data(str(train), str(evaluation), folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    preprocess(folder / "dataset", str(tiny_46), folder / "shards", folder / "more.jsonl", PreprocessSettings())
    return folder / "shards"
