"""The texts that a tokenizer is to know."""

import json
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune.data.texts import read_texts
from minicpmv_finetune.errors import UserError


def sample(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, **fields}


def test_every_text_of_conversations_and_answers_is_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    turns = [*sample("<image>\nWhich color?", "Red.", image="missing.png")["conversations"]]
    turns = [{"role": "system", "content": "Be short."}, *turns, *sample("Sure?", "Yes.")["conversations"]]
    items = [{"conversations": turns, "image": "missing.png"}, sample("颜色？", "红色", answers=["红"])]
    file.write_text("\n".join(json.dumps(item) for item in items))
    expected = ["Be short.", "Which color?", "Red.", "Sure?", "Yes.", "颜色？", "红色", "红"]
    assert read_texts(str(file)) == expected
    assert read_texts(str(tmp_path / "*.jsonl")) == expected


def test_samples_that_cannot_be_used_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"id": "x"}, sample("Which color?", "Red."), 7]))
    assert read_texts(str(tmp_path / "train.json")) == ["Which color?", "Red."]
    note = capsys.readouterr().err
    assert note.startswith("note: 2 samples cannot be used, and their texts are left out; the first is ")
    assert "sample 0" in note


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"conversations": [}]', "line 1: invalid JSON at line 1, column 21"),
        ("[7, 8]", "none of the 2 samples can be used; the first is .*sample 0: "),
        ("", "the file is empty"),
        ("<html>", "not JSON|invalid JSON"),
    ],
)
def test_a_file_without_texts_is_refused_in_a_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_texts(str(tmp_path / "train.json"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        read_texts(str(tmp_path / "nowhere.json"))
