"""The check of commands that the documentation site makes while it is built, without the program's packages."""

import typer
from typer.core import TyperGroup

from docs.site_commands import commands, unknown_commands
from minicpmv_finetune.cli.main import app


def test_the_commands_in_the_source_are_those_of_the_program() -> None:
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    expected = {
        name: frozenset(command.commands if isinstance(command, TyperGroup) else ())
        for name, command in program.commands.items()
    }
    assert commands() == expected


def test_unknown_commands_are_found() -> None:
    page = (
        "`minicpmv-finetune no-such`, `minicpmv-finetune run --out x` and `make docs`\n\n"
        "```sh\nmake nothing\ndata=$(minicpmv-finetune schedule nope)\nminicpmv-finetune schedule list\n```\n"
    )
    assert set(unknown_commands(page)) == {
        "minicpmv-finetune no-such",
        "minicpmv-finetune schedule nope",
        "make nothing",
    }
