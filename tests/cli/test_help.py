"""The help texts, as a terminal of 80 columns shows them."""

import re
from collections.abc import Iterator

import pytest
import typer
from rich.table import Table
from typer.core import TyperGroup
from typer.testing import CliRunner

from minicpmv_finetune.cli.main import app, show_option_names_whole


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, by its words."""
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    for name, command in program.commands.items():
        if isinstance(command, TyperGroup):
            yield from ((name, inner) for inner in command.commands)
        else:
            yield (name,)


@pytest.mark.parametrize("words", [words for words in commands() if words != ("train",)], ids=" ".join)
def test_help_shows_the_names_of_all_options_whole(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    monkeypatch.setattr("typer.rich_utils.Table", Table)
    show_option_names_whole()
    command: object = typer.main.get_command(app)
    for word in words:
        assert isinstance(command, TyperGroup)
        command = command.commands[word]
    shown = CliRunner().invoke(app, [*words, "--help"]).stdout
    assert max(map(len, shown.splitlines())) <= 80
    shown_parameters = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]  # type: ignore[attr-defined]
    names = {name for parameter in shown_parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    missing = {name for name in names if name.startswith("--") and not re.search(rf"{name}(?![\w-])", shown)}
    assert missing == set()
