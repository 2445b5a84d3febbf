"""What tests of real faults share: a store behind a relay that misbehaves, and what each step needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.network_relay import Wire, relay
from tests.faults.steps import TRAIN


@pytest.fixture
def wire(s3_server: dict[str, str], s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The store's own server behind a relay, which the environment leads to."""
    with relay(s3_server["AWS_ENDPOINT_URL"]) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.address)
        yield between


@pytest.fixture(scope="session")
def moments() -> int:
    """How many moments of a step are drawn: 1 with the other tests, 3 in `make test-faults`, 20 in the long run."""
    return int(os.environ.get("FAULT_MOMENTS", "1"))


@pytest.fixture(scope="session")
def inputs(tiny_46: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every step needs, made without disturbance: `data.json`, `base`, and the steps' results."""
    import json

    from minicpmv_finetune.components.merge.merge import MergeSettings, merge
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
    from minicpmv_finetune.components.train.launch import launch
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
    launch([*TRAIN.split(), *_where(folder), "--output_dir", str(folder / "adapter")])
    merge(str(tiny_46), folder / "adapter", folder / "shards", folder / "model", folder / "merge.json", MergeSettings())
    return folder


def _where(folder: Path) -> list[str]:
    return ["--model_name_or_path", str(folder / "base"), "--data_path", str(folder / "shards")]
