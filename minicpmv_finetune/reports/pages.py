"""The steps' reports: HTML pages that need no other file, all of one design (`pages.css`).

A step's folder holds its `report.html`, a Jinja template with escaping on, and its `report.css`, what that page alone
has. Everything that comes from data or a model is escaped; only our own style sheets go in as they are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minicpmv_finetune import storage

_HERE = Path(__file__).parent


def write_page(
    path: Path, folder: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., object]] | None = None
) -> None:
    """Write a step's report.

    Args:
        path: receives it, whole or not at all.
        folder: with `report.html` and `report.css`; templates beside this file can be included.
        values: what the template names; one that is missing is an error.
        filters: of the template.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    style = Markup((_HERE / "pages.css").read_text() + (folder / "report.css").read_text())  # noqa: S704
    page = environment.get_template("report.html").render(style=style, **values)
    # Half of a surrogate pair, which a file name may hold, is no character.
    storage.write_bytes(str(path), page.encode(errors="replace"))
