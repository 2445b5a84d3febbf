"""Text in the Markdown summaries of the steps, as the Kubeflow UI shows them."""

import html
import re
from pathlib import Path

# The UI makes a link of an address by itself, and would keep a backslash in it.
_ADDRESS_OR_MARK = re.compile(r"https?://[^\s<]+|[\\`*_\[\]|~]")
_END_OF_CELL = re.compile(r"(?<=\S) \|")
_NO_BREAK_SPACE = "\u00a0"


def escape(text: str) -> str:
    """Text for a paragraph or the cell of a table: no HTML, and no mark that the UI would take for formatting.

    The UI would otherwise set the middle of `peak_memory_mb` in italics and remove its underscores. Quotation marks
    stay: it shows their HTML entities as they are written.
    """
    flat = " ".join(html.escape(text, quote=False).split())
    return _ADDRESS_OR_MARK.sub(lambda found: found[0] if len(found[0]) > 1 else f"\\{found[0]}", flat)


def with_code(text: str) -> str:
    """A help text whose JSON and whose names with underscores are marked as code, so that the UI shows them whole."""
    return re.sub(r'\{.*\}|"?\b\w*[a-z]_[a-z]\w*\b"?', r"`\g<0>`", text)


def write_summary(path: str, text: str) -> None:
    """Write a step's summary; its tables have room between the columns, which the UI puts side by side without any."""
    gap = _NO_BREAK_SPACE * 3
    lines = [_END_OF_CELL.sub(f"{gap} |", line) if line.startswith("| ") else line for line in text.split("\n")]
    Path(path).write_text("\n".join(lines))
