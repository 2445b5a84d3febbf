"""The first half of the tutorial, typed as it is on the page, in a folder that has a small stand-in for its data.

The package is not fetched: twelve images of the same kind are drawn into the cache that the converter reads. What is
printed must have the lines that the page shows, with other numbers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.docs import tutorial
from tests.docs.pages import ROOT, blocks

pytestmark = pytest.mark.docs_only

HERE = tutorial.PAGE.read_text().partition("\n## On Kubeflow")[0]
COLORS = ("red", "green", "blue", "black")
ANOTHER_TEST = ("make install", ". .venv/bin/activate", "pip install")
"""Beginnings of what prepares this environment, which the tests have already."""
DECISION = "gate "
"""How the line begins that says how good the model is, which depends on the data."""
SERVERS = ("serve", "chat")
"""Commands that run until Ctrl-C; `tests/serving` does what they do."""


def _draw_stand_in(cache: Path) -> None:
    """Write twelve images a split and their questions as the package contains them."""
    for split in ("train", "test"):
        folder = cache / "content" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        questions = []
        for number in range(12):
            color = COLORS[number % 4]
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).rectangle((10, 10, 40 + number, 50), fill=color)
            image.save(folder / "images" / f"{number}.png")
            questions += [
                ["what color is the shape?", color, number],
                ["what shape does the image contain?", "rectangle", number],
                ["is there a circle?", "no", number],
            ]
        (folder / "questions.json").write_text(json.dumps(questions))
    (cache / "easy_vqa-1.0-py3-none-any.whl").write_bytes(b"")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the repository's benchmarks, the stand-in, and a PATH that leads to this package."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    _draw_stand_in(tmp_path / "build" / "public" / "packages" / "pypi" / "easy-vqa-1.0")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    start = "from minicpmv_finetune.cli.main import main; main()"
    (programs / "minicpmv-finetune").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


def _lines(text: str) -> set[str]:
    """The lines of a text, without numbers, drawings and distances."""
    plain = re.sub(r"[\d.,%e+-]*\d[\d.,%e+-]*", "N", text)
    return {re.sub(r"\s+", " ", re.sub(r"[━│╭╮╰╯─]", "", line)).strip() for line in plain.splitlines()}


@pytest.mark.timeout(1800)  # it trains and evaluates in many processes
def test_its_first_half_can_be_typed(desk: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{desk / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }
    shown = [block for block in blocks(HERE) if block.language in ("sh", "text", "python")]
    printed, answers = "", False
    for block in shown:
        if block.language == "text":
            if answers:
                assert printed.strip()  # a model that has seen twelve images says something else
                continue
            lines = [line for line in _lines(block.text) if line and not line.startswith(DECISION)]
            first_words = {" ".join(line.split()[:2]) for line in lines}
            missing = {words for words in first_words if not any(words in line for line in _lines(printed))}
            assert not missing, f"{missing}\nnot in\n{printed}"
            continue
        printed = ""
        if block.language == "python":
            commands = [["python", "-c", block.text]]
        else:
            commands = [list(line.words) for line in tutorial.lines_of(block) if not line.remark]
        answers = bool(commands) and commands[-1][1] == "predict"
        for words in commands:
            if " ".join(words).startswith(ANOTHER_TEST) or words[1] in SERVERS:
                continue
            done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
            printed += done.stdout + done.stderr
    assert (desk / "build" / "mine" / "report.html").is_file()
    assert (desk / "build" / "check" / "data-report.html").is_file()


def test_what_is_not_run_says_why() -> None:
    remarks = {line.remark for line in tutorial.typed(HERE) if line.remark}
    assert remarks == {"needs the hub"}
