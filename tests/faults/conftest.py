"""Fixtures of the tests with real faults: a store behind a disturbing relay, and the inputs of every step."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.network_relay import Relay, start_relay
from tests.faults.step_commands import TRAIN_FLAGS


@pytest.fixture
def s3_relay(s3_server: dict[str, str], s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """A relay in front of the S3 server; the environment's endpoint is the relay's address."""
    with start_relay(s3_server["AWS_ENDPOINT_URL"]) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.address)
        yield relay


@pytest.fixture(scope="session")
def moments() -> int:
    """How many random moments of a step are tested: 1 by default, 3 in `make test-faults`, 20 in the long run."""
    return int(os.environ.get("FAULT_MOMENTS", "1"))


@pytest.fixture(scope="session")
def prepared(tiny_46: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of every step up to training, made without disturbance: the data, `base`, shards."""
    import json

    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "base").symlink_to(tiny_46)
    for name, count in (("train", 96), ("eval", 16)):
        samples = json.loads((digits / f"{name}.json").read_text())[:count]
        for sample in samples:
            sample["image"] = str(digits / sample["image"])
        (folder / f"{name}.json").write_text(json.dumps(samples))
    validate_data(
        str(folder / "train.json"),
        str(folder / "eval.json"),
        folder / "dataset",
        folder / "rejects.jsonl",
        ValidationSettings(),
    )
    preprocess(
        folder / "dataset", str(tiny_46), folder / "shards", folder / "preprocess-rejects.jsonl", PreprocessSettings()
    )
    return folder


@pytest.fixture(scope="session")
def inputs(prepared: Path) -> Path:
    """The same folder with the inputs of every step: an adapter and a merged model too."""
    from minicpmv_finetune.components.merge.merge import MergeSettings, merge
    from minicpmv_finetune.components.train.launch import launch

    folder = prepared
    model_and_data = ["--model_name_or_path", str(folder / "base"), "--data_path", str(folder / "shards")]
    launch([*TRAIN_FLAGS.split(), *model_and_data, "--output_dir", str(folder / "adapter")])
    base = str(folder / "base")
    merge(base, folder / "adapter", folder / "shards", folder / "model", folder / "merge.json", MergeSettings())
    return folder


@pytest.fixture
def inputs_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A function that returns the folder with a step's inputs and undisturbed result, and trains only if needed."""
    early = ("validate-data", "preprocess")
    return lambda step: request.getfixturevalue("prepared" if step in early else "inputs")
