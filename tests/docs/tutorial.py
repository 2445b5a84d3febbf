"""How tests follow the tutorial: the commands, programs and files below each of its headings, in order."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.docs.pages import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_ASSIGNMENT = re.compile(r'^(\w+)="\$\((.+)\)"$')
_VARIABLE = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Typed:
    """A line that a reader types.

    Attributes:
        words: Words of the command, with `$NAME` where a variable is.
        variable: Variable that receives what the command prints; may be empty.
        remark: Comment behind the command, such as `needs the hub`.
    """

    words: tuple[str, ...]
    variable: str = ""
    remark: str = ""

    def with_values(self, variables: Mapping[str, str]) -> list[str]:
        """The words with the values of their variables."""
        return [_VARIABLE.sub(lambda match: variables[match[1]], word) for word in self.words]


def section(title: str) -> str:
    """The text below a heading that begins with a title, up to the next heading of its level or above.

    Raises:
        LookupError: There is no such heading.
    """
    text = PAGE.read_text()
    found = [heading for heading in _HEADING.finditer(text) if heading[2].startswith(title)]
    if not found:
        raise LookupError(title)
    first = found[0]
    later = (other for other in _HEADING.finditer(text, first.end()) if len(other[1]) <= len(first[1]))
    end = next(later, None)
    return text[first.end() : end.start() if end else None]


def typed(text: str) -> Iterator[Typed]:
    """Yield the lines of a text's shell blocks."""
    for found in blocks(text):
        if found.language == "sh":
            yield from lines_of(found)


def lines_of(found: Block) -> Iterator[Typed]:
    """Yield the lines of a shell block."""
    for line in found.text.replace("\\\n", " ").splitlines():
        command, _, remark = line.partition("  # ")
        assigned = _ASSIGNMENT.match(command)
        variable, command = assigned.groups() if assigned else ("", command)
        yield Typed(tuple(shlex.split(command)), variable, remark)


def block(text: str, language: str) -> str:
    """The only block of a language."""
    (found,) = (one.text for one in blocks(text) if one.language == language)
    return found
