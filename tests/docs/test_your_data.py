"""The commands of docs/your-data.md, run in each section's own folder on the files that the section shows."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from minicpmv_finetune.cli import main
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from tests.docs.pages import ROOT, blocks

PAGE = (ROOT / "docs" / "your-data.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
_FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", re.DOTALL | re.MULTILINE)


def write_files(section: str) -> None:
    """Write the files that a section shows, and an image for each name in it."""
    for name, content in _FILE.findall(section):
        Path(name).write_text(content)
    for name in set(re.findall(r"[\w/]+\.jpg", section)):
        # COCO and LLaVA name images within a folder that the command names.
        for folder in ("", "photos", "scans"):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), "red").save(path)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the page in this process."""
    program, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *words])
    code: object = None
    try:
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        else:
            main.main()
    except SystemExit as ended:
        code = ended.code
    assert not code, command


@pytest.mark.parametrize("heading", [name for name in SECTIONS if name not in ("Anything else", "Check")])
def test_each_form_becomes_data_that_is_accepted_whole(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    section = SECTIONS[heading]
    write_files(section)
    shown = list(blocks(section))
    for number, block in enumerate(shown):
        if block.language != "sh":
            continue
        for command in block.text.splitlines():
            run(command, monkeypatch)
        output = capsys.readouterr()
        if shown[number + 1 :] and shown[number + 1].language == "text":
            assert shown[number + 1].text.strip() in output.out + output.err
        for data in set(re.findall(r"(?:train|more)\.jsonl?", block.text)):
            settings = ValidationSettings(max_reject_ratio=0, eval_fraction=0)
            validate_data(data, "", Path("dataset"), Path("rejects.jsonl"), settings)


def test_a_box_is_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(SECTIONS["COCO"])
    run("python examples/data_from_coco.py instances.json photos train.json", monkeypatch)
    (answer,) = re.findall(r"`(\[\{.*?\}\])`", SECTIONS["COCO"])
    assert answer.replace('"', '\\"') in Path("train.json").read_text()


def test_a_program_of_a_few_lines_writes_data_that_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(SECTIONS["Anything else"])
    (program,) = [block.text for block in blocks(SECTIONS["Anything else"]) if block.language == "python"]
    exec(compile(program, "docs/your-data.md", "exec"), {})
    settings = ValidationSettings(max_reject_ratio=0, eval_fraction=0)
    validate_data("train.json", "", Path("dataset"), Path("rejects.jsonl"), settings)


def test_data_is_checked_and_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    samples = []
    for number in range(100):
        Image.new("RGB", (64, 48), (number * 2, 0, 0)).save(f"{number}.png")
        turns = [{"role": "user", "content": "How red?"}, {"role": "assistant", "content": str(number)}]
        samples.append({"image": f"{number}.png", "conversations": turns})
    Path("train.json").write_text(json.dumps(samples))
    (check,) = [block.text for block in blocks(SECTIONS["Check"]) if block.language == "sh"]
    for command in check.splitlines():
        run(command, monkeypatch)
    assert "MiniCPM-V 4.6" in capsys.readouterr().out
    assert Path("build/data-report.html").is_file()
    assert Path("build/rejects.jsonl").read_text() == ""
