"""Every command in the documentation is one that exists, with options that exist.

Commands of fenced blocks are parsed completely by the program's own parser, without running them; of commands within a
sentence, which may be abbreviated, the name and the options are checked.
"""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from minicpmv_finetune.cli.main import app
from tests.docs.pages import PAGES, ROOT, blocks, name_of, spans

PROGRAM = "minicpmv-finetune"
MAKEFILE = (ROOT / "Makefile").read_text()
PROGRAMS = {PROGRAM, "make", "python", ".venv/bin/python", "torchrun"}
SHELLS = {"sh", "bash", "console"}


def commands(text: str) -> Iterator[str]:
    """Yield the commands of this project in a page's shell blocks: of `console` blocks, the lines after `$`."""
    for block in blocks(text):
        if block.language not in SHELLS:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            command = line.strip()
            if block.language == "console":
                if not command.startswith("$ "):
                    continue
                command = command.removeprefix("$ ")
            if command.split(" ")[0] in PROGRAMS:
                yield command


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@cache
def program() -> TyperGroup:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words after its name."""
    command: Any = program()
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{command.name}: no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@cache
def training_flags() -> frozenset[str]:
    from minicpmv_finetune.components.train.arguments import parser

    return frozenset(option for action in parser()._actions for option in action.option_strings)


def check_training_flags(words: list[str]) -> None:
    for word in words:
        if word.startswith("--") and word not in {"--print-plan", "--help"}:
            assert word.partition("=")[0] in training_flags(), f"train has no flag {word}"


def parse_completely(words: list[str]) -> None:
    command, rest = resolve(words)
    if command.name == "train":
        check_training_flags(rest)
        return
    try:
        command.make_context(command.name, list(rest))
    except typer.Exit:
        pass  # --help
    except Exception as error:
        # The parser's exceptions have no public base class.
        pytest.fail(f"{PROGRAM} {' '.join(words)}: {error}")


def check_names(words: list[str]) -> None:
    """Check a command within a sentence: its name, and that each option is one of its own."""
    command, rest = resolve(words)
    if command.name == "train":
        check_training_flags(rest)
        return
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        assert not word.startswith("-") or word.partition("=")[0] in options | {"--help"}, f"{command.name}: {word}"


def check_target(words: list[str]) -> None:
    for target in words:
        if "=" not in target:
            assert re.search(rf"^{re.escape(target)}:(?!=)", MAKEFILE, re.MULTILINE), f"make has no target {target}"


def check_python(words: list[str]) -> None:
    """Check `python FILE` and `python -m MODULE`."""
    if words[0] == "-m":
        assert find_spec(words[1]), f"no module {words[1]}"
    elif words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


@pytest.fixture
def without_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPMV_FINETUNE_PROFILE", str(ROOT / "k8s" / "profiles" / "dev.yaml"))
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("without_profile")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_blocks_can_be_parsed(page: Path) -> None:
    for command in commands(page.read_text()):
        words = words_of(command)
        match words:
            case [first, *rest] if first == PROGRAM:
                parse_completely(rest)
            case ["make", *rest]:
                check_target(rest)
            case [first, *rest] if first.endswith("python"):
                check_python(rest)
            case ["torchrun", *rest] if "-m" in rest:
                module, *flags = rest[rest.index("-m") + 1 :]
                assert find_spec(module), f"no module {module}"
                check_training_flags(flags)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_sentences_exist(page: Path) -> None:
    for span in spans(page.read_text()):
        first, _, rest = span.partition(" ")
        words = rest.replace("…", "").replace("'", "").split()
        if first == PROGRAM:
            check_names(words)
        elif first == "make":
            check_target(words)
        elif first == "python" and words:
            check_python(words)


@pytest.mark.parametrize(
    "command",
    ["no-such-command", "compile --no-such-option", "schedule no-such-command", "submit -p", "promote 7 --reason"],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse_completely(command.split())


def test_most_commands_of_the_program_are_documented() -> None:
    shown = {
        words_of(command)[1]
        for page in PAGES
        for command in [*commands(page.read_text()), *spans(page.read_text())]
        if command.startswith(f"{PROGRAM} ") and len(command.split()) > 1
    }
    assert set(program().commands) - shown == set()
