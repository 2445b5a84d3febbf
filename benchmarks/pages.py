"""Tables that benchmarks write into pages of the documentation."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def replace_part(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what is between two marks of a page.

    Args:
        page: The page.
        begin: The mark in front of the text.
        end: The mark behind it.
        text: The new text, with its line breaks.
    """
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}{text}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
