"""Help texts as plain text, in the groups of the commands and options.

Typer's own help draws boxes with rich, whose import takes longer than everything else that a help text needs, and
boxes leave little room for words where a terminal is narrow.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from minicpmv_finetune.errors import UserError

from .usage import unknown_command

_NARROW = 70
_WIDEST_NAME = 30
_SHORT_NAME = 14
_Row = tuple[str, str]


class Command(TyperCommand):
    """A command whose help lists its options by group."""

    def get_params(self, ctx: Any) -> Any:
        """All options and arguments."""
        return _with_booleans(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the words after the command; an exception knows at which command it was raised."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options by group."""
        _write_sections(formatter, _parameters(self, ctx))


class Group(TyperGroup):
    """A group of commands whose help lists them by panel."""

    def get_params(self, ctx: Any) -> Any:
        """All options and arguments."""
        return _with_booleans(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the words after the group; without any, show what there is."""
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say which one is like it."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            raise UserError(unknown_command(ctx.command_path, name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, and then the options."""
        self.format_commands(ctx, formatter)
        _write_sections(formatter, _parameters(self, ctx))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first paragraph of its help."""
        rows = []
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                rows.append((command.rich_help_panel or "Commands", (name, _first_paragraph(command.help or ""))))
        _write_sections(formatter, rows)


def _with_booleans(parameters: Any) -> Any:
    """The parameters; the switches among them that typer adds itself are false where they are not given, not None.

    To make a Boolean of None typer imports pydantic, which takes longer than all that a help text or a mistake needs.
    """
    for parameter in parameters:
        if parameter.default is None and getattr(parameter, "is_flag", False):
            parameter.default = False
    return parameters


def _parameters(command: Any, ctx: Any) -> list[tuple[str, _Row]]:
    """The name of each parameter's group, and the two cells of its row; what has no group is last."""
    found = []
    for parameter in command.get_params(ctx):
        if record := parameter.get_help_record(ctx):
            plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
            found.append((getattr(parameter, "rich_help_panel", None) or plain, record))
    return sorted(found, key=lambda row: 0 if row[0] == "Arguments" else 2 if row[0] == "Options" else 1)


def _write_sections(formatter: Any, rows: Iterable[tuple[str, _Row]]) -> None:
    sections: dict[str, list[_Row]] = {}
    for title, row in rows:
        sections.setdefault(title, []).append(row)
    for title, section_rows in sections.items():
        with formatter.section(title):
            for line in _lines(section_rows, formatter.width):
                formatter.write(f"{line}\n")


def _lines(rows: Sequence[_Row], width: int) -> Iterator[str]:
    """The lines of a section: each description beside its name, or below it where there is little room."""
    longest = max(len(name) for name, _ in rows)
    beside = width >= _NARROW or longest <= _SHORT_NAME
    column = min(longest, _WIDEST_NAME if beside else 0) + 4
    for name, text in rows:
        # Names that a user copies, such as those of options and variables, stay whole.
        lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False) or [""]
        if len(name) + 4 <= column:
            first = lines.pop(0)
            yield f"  {name:<{column - 2}}{first}".rstrip()
        else:
            yield f"  {name}"
        yield from (" " * column + line for line in lines)


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().partition("\n\n")[0].split())
