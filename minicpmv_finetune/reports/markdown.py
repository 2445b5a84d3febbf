"""Text in the Markdown summaries of the steps, as the Kubeflow UI shows them."""

import html


def escape(text: str) -> str:
    """Text for a paragraph or the cell of a table: no HTML, and no mark that the UI would take for formatting.

    The UI would otherwise set the middle of `peak_memory_mb` in italics and remove its underscores.
    """
    flat = " ".join(html.escape(text).split())
    for mark in "\\`*_[]|~":
        flat = flat.replace(mark, f"\\{mark}")
    return flat
