"""Sentences and tables on a terminal: lines that are not too wide, and end between words."""

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 110  # columns; longer lines are tiresome to read
_UNKNOWN = 80  # columns of a terminal that reports none, which is common in containers
_INDENT = "  "  # of the lines that go on with a sentence
# What is between backquotes is copied by the reader, so it is one word, with what touches it.
_WORD = re.compile(r"(?:`[^`]*`|[^\s`])+|\S+")


def print_sentence(sentence: str, to: TextIO | None = None) -> None:
    """Print a sentence, or several on a line each.

    On a terminal, also a dumb one, long sentences go on in further lines; a pipe or a file gets each whole on one line.

    Args:
        sentence: The text.
        to: Where it is printed; None is stderr.
    """
    stream = to or sys.stderr
    if stream.isatty():
        sentence = "\n".join(line for one in sentence.splitlines() for line in _lines(one, _columns(stream)))
    print(sentence, file=stream, flush=True)


def console(to: TextIO | None = None, **options: Any) -> "Console":
    """A console of rich that prints each text as it is, also a path with brackets or colons.

    On a dumb terminal it is as wide as the terminal; rich takes it for 80 columns wide.

    Args:
        to: Where it prints; None is stdout.
        **options: Further arguments of `rich.console.Console`.
    """
    from rich.console import Console

    made = Console(file=to, highlight=False, markup=False, emoji=False, **options)
    if made.is_dumb_terminal:
        made.size = made.size._replace(width=_columns(to or sys.stdout))
    return made


def _columns(terminal: TextIO) -> int:
    """How wide the lines on a terminal may be."""
    try:
        # COLUMNS, or what stdout is shown on, and stdout may be a pipe.
        columns = shutil.get_terminal_size((0, 0)).columns or os.get_terminal_size(terminal.fileno()).columns
    except OSError:
        columns = 0
    return min(columns or _UNKNOWN, WIDEST)


def _lines(sentence: str, columns: int) -> Iterator[str]:
    """The lines of a sentence; a word that is longer than a line stays whole on a line of its own."""
    if _cells(sentence) <= columns:
        yield sentence
        return
    line = ""
    for word in _WORD.findall(sentence):
        if line and _cells(f"{line} {word}") > columns:
            yield line
            line = f"{_INDENT}{word}"
        else:
            line = f"{line} {word}" if line else word
    yield line


def _cells(text: str) -> int:
    """The number of columns that a text takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
