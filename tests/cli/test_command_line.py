"""What a user sees of the command line itself: the greeting, mistakes, and completion in a shell."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from minicpmv_finetune import environment
from minicpmv_finetune.cli.main import app, main

PROGRAM = "import sys; sys.argv[0] = 'minicpmv-finetune'; from minicpmv_finetune.cli.main import main; main()"


def run(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_alone_it_greets_with_the_two_commands_that_matter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("", monkeypatch) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in shown if line.startswith("  minicpmv-finetune")] == [
        "minicpmv-finetune demo",
        "minicpmv-finetune run --data train.json --out build/mine",
    ]
    assert shown[-1] == "`minicpmv-finetune --help` lists all commands."
    assert max(map(len, shown)) <= 60


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("rnu", "no command rnu; did you mean `minicpmv-finetune run`?"),
        ("zzz", "no command zzz; `minicpmv-finetune --help` lists all."),
        ("schedule aply", "no command aply; did you mean `minicpmv-finetune schedule apply`?"),
        ("--vers", "no option --vers; did you mean --version? see `minicpmv-finetune --help`."),
        ("run", "run: --data is missing; type `minicpmv-finetune run --data …`."),
        ("run --dta x", "run: no option --dta; did you mean --data? see `minicpmv-finetune run --help`."),
        ("run --lora_r 8", "run: no option --lora_r; did you mean --lora-r? see `minicpmv-finetune run --help`."),
        (
            "run --max_steps 3",
            "run: no option --max_steps; flags of the training are given as --training-flags '{\"max_steps\": …}', "
            "see `minicpmv-finetune run --help`.",
        ),
        ("plan --data", "plan: option '--data' requires an argument; see `minicpmv-finetune plan --help`."),
        ("demo --fresh=1", "demo: option '--fresh' does not take a value; see `minicpmv-finetune demo --help`."),
        (
            "merge --adapter x",
            "merge: --base-model is missing; "
            "type `minicpmv-finetune merge --base-model … --adapter … --shards … --out …`.",
        ),
        ("promote", "promote: VERSION is missing; type `minicpmv-finetune promote VERSION --reason …`."),
        (
            "run --data d --runner x",
            "run: --runner: 'x' is not one of 'subprocess', 'docker'; see `minicpmv-finetune run --help`.",
        ),
        ("demo x", "demo: got unexpected extra argument(s) (x); see `minicpmv-finetune demo --help`."),
    ],
)
def test_a_mistake_in_the_words_is_one_sentence_with_the_next_command(
    words: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words, monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"error: {sentence}\n"


def test_a_group_alone_shows_its_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schedule", monkeypatch) == 0
    assert "  pause   Stop a schedule" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", "--help", "run --help", "rnu", "run --dta x", "--version"])
def test_help_and_mistakes_import_no_large_library(words: str) -> None:
    code = f"""
import sys
from minicpmv_finetune.cli.main import main
sys.argv[1:] = {words.split()!r}
try:
    main()
finally:
    large = {{"pydantic", "rich", "tqdm", "yaml", "numpy", "torch", "kfp", "boto3"}}
    sys.exit(f"imported: {{sorted(large & set(sys.modules))}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("ru", ["run", "runs"]),
        ("schedule ", ["apply", "list", "pause", "resume", "delete"]),
        ("run --ru", ["--runner"]),
        ("run --runner ", ["subprocess", "docker"]),
        ("plan --recipe 4.5-8", ["4.5-80gb", "4.5-8x80gb"]),
        ("recipes 4.5-2", ["4.5-24gb"]),
        ("train --use-l", ["--use_liger_kernel", "--use_lora"]),
        ("run --data ", []),
    ],
)
def test_a_shell_completes_commands_options_and_values(
    line: str, completed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"minicpmv-finetune {line}"
    monkeypatch.setenv("_MINICPMV_FINETUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert run("", monkeypatch) == 0
    assert capsys.readouterr().out.split() == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_MINICPMV_FINETUNE_COMPLETE", f"source_{shell}")
    assert run("", monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "_MINICPMV_FINETUNE_COMPLETE=complete_" in shown
    assert "minicpmv-finetune" in shown


def test_bash_completes_with_the_shown_script(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    program = tmp_path / "minicpmv-finetune"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}\n")
    program.chmod(0o755)
    line = """
source <(_MINICPMV_FINETUNE_COMPLETE=source_bash minicpmv-finetune)
COMP_WORDS=(minicpmv-finetune pref); COMP_CWORD=1
_minicpmv_finetune_completion minicpmv-finetune
echo "${COMPREPLY[@]}"
"""
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", line], capture_output=True, text=True, env=variables)
    assert done.stdout.split() == ["preflight"], done.stderr


TEXT_ONLY = [
    {
        "conversations": [
            {"role": "user", "content": f"{number} + 1?"},
            {"role": "assistant", "content": f"{number + 1}"},
        ]
    }
    for number in range(40)
]


@pytest.mark.parametrize("quiet", ["", "--quiet"])
def test_a_document_is_alone_on_stdout(
    quiet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.json").write_text(json.dumps(TEXT_ONLY))
    out = tmp_path / "dataset"
    assert run(f"validate-data --data {tmp_path}/train.json --out {out} --output json {quiet}", monkeypatch) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["dataset"] == str(out)
    assert sum(document["rows"].values()) == 40
    assert "warning: none of the" in shown.err
    assert ("100%" in shown.err) == (not quiet)
    assert ("→" in shown.err) == (not quiet)
    assert not environment.QUIET.read()


def test_a_mistake_leaves_stdout_empty_for_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"validate-data --data {tmp_path}/none.json --out {tmp_path}/out --output json", monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")


def commands() -> Iterator[str]:
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    for name, command in program.commands.items():
        if isinstance(command, TyperGroup):
            yield from (f"{name} {inner}" for inner in command.commands)
        else:
            yield name


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_has_a_document_for_programs(name: str) -> None:
    command: Any = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    options = {option for parameter in command.params for option in parameter.opts}
    # train writes training.json, logs prints a log, compile writes the file that is named, and servers do not end.
    assert "--output" in options or name in {"train", "logs", "compile", "serve", "chat"}


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_an_encoding_without_some_characters_ends_nothing(encoding: str) -> None:
    code = "import sys; sys.argv[1:] = ['zzz…']; from minicpmv_finetune.cli.main import main; main()"
    variables = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.returncode == 2
    assert done.stderr == "error: no command zzz\\u2026; `minicpmv-finetune --help` lists all.\n"
