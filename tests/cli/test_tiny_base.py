"""`tiny-base`: a base model for one's own data, without a download."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minicpmv_finetune.cli.local import TINY_BASE_OPTIONS
from minicpmv_finetune.cli.main import app
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from tests.docs.pages import ROOT


def test_it_knows_the_texts_of_the_data_and_says_how_to_train_it(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Which color?"}, {"role": "assistant", "content": "Turquoise"}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}]))
    out = tmp_path / "base"
    words = ["tiny-base", "--generation", "4.5", "--corpus", str(tmp_path / "train.json"), "--out", str(out)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert f"a tiny untrained MiniCPM-V 4.5 in {out}, which knows the 2 texts of" in done.output
    assert f"run --data {tmp_path / 'train.json'} --base-model {out} {TINY_BASE_OPTIONS}" in done.output
    assert Encoder.from_checkpoint(out).tokenizer.tokenize("Turquoise") == ["Turquoise"]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_documentation_shows_the_options_that_it_says(page: str) -> None:
    assert f" --base-model build/base {TINY_BASE_OPTIONS}\n" in (ROOT / page).read_text()


def test_a_malformed_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[{]")
    words = ["tiny-base", "--corpus", str(tmp_path / "train.json"), "--out", str(tmp_path / "base")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError)
    assert "invalid JSON" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
