"""A small dataset for the tests of the evaluate step."""

import json
from pathlib import Path

import pytest

from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data


@pytest.fixture(scope="session")
def dataset(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated dataset whose evaluation split has twelve digits, tagged by parity."""
    folder = tmp_path_factory.mktemp("evaluate")
    held_out = json.loads((digits / "eval.json").read_text())[:12]
    for number, raw in enumerate(held_out):
        raw["tags"] = ["even" if number % 2 == 0 else "odd"]
    chosen = digits / "twelve.json"
    chosen.write_text(json.dumps(held_out))
    few = digits / "few.json"
    few.write_text(json.dumps(json.loads((digits / "train.json").read_text())[:4]))
    validate_data(str(few), str(chosen), folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    return folder / "dataset"
