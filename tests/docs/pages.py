"""How the tests read the documentation: its pages, their fenced blocks, code spans and links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "k8s/README.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "minicpmv_finetune" / "components").glob("*/README.md"),
    ]
)
"""Every page that people read."""

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: The word after the opening fence, such as `sh`; may be empty.
        text: What is between the fences.
        line: Number of the block's first line in the page.
    """

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for match in _FENCE.finditer(text):
        yield Block(match.group(1), match.group(2), text.count("\n", 0, match.start(2)) + 1)


def prose(text: str) -> str:
    """Return a page's text without its fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Return the code spans in a page's prose."""
    return _SPAN.findall(prose(text))


def links(text: str) -> list[str]:
    """Return the targets of the links in a page's prose, code spans aside."""
    return _LINK.findall(_SPAN.sub("code", prose(text)))


def anchors(text: str) -> set[str]:
    """Return the anchors that a page's headings have, as GitHub and mkdocs make them."""
    found = set()
    for heading in _HEADING.findall(prose(text)):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower()
        found.add(plain.replace(" ", "-"))
    return found
