"""The HTML reports of the steps: self-contained pages of one design (`pages.css`).

A step's folder contains its `report.html`, a Jinja template with automatic escaping, and its `report.css`, the styles
of that page alone. All text from data or a model is escaped; only this project's style sheets are inserted unchanged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minicpmv_finetune import storage

_HERE = Path(__file__).parent
_LINE = 25  # characters for which a line of a long text counts at least


def write_page(
    path: Path, folder: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., object]] | None = None
) -> None:
    """Write the report of a step.

    Args:
        path: Path of the page, which is written atomically.
        folder: Folder with `report.html` and `report.css`; the template can include the templates of this module.
        values: Variables of the template, by name; a missing variable is an error.
        filters: Filters of the template, by name.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"beginning": _beginning, **(filters or {})}
    style = Markup((_HERE / "pages.css").read_text() + (folder / "report.css").read_text())  # noqa: S704
    page = environment.get_template("report.html").render(style=style, **values)
    # A file name may contain half of a surrogate pair, which cannot be encoded.
    storage.write_bytes(str(path), page.encode(errors="replace"))


def _beginning(text: str, most: int) -> str:
    """What a page shows of a text before the reader asks for more; a text of up to `most` characters is shown whole."""
    lines = text.split("\n")
    if len(text) <= most and len(lines) <= most // _LINE:
        return text
    # Not the last few characters: "more" would take as much room as they do.
    return "\n".join(lines[: most // _LINE])[: most * 2 // 3].rstrip()
