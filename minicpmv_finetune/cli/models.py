"""The commands with which a person changes the champion."""

from typing import Annotated, Any

import typer

from .options import DEFAULT_MODEL, Model, reported

PANEL = "Models"
app = typer.Typer()
Reason = Annotated[str, typer.Option(help="Why the champion changes; stored in the log of moves.")]


@app.command(rich_help_panel=PANEL)
@reported
def promote(
    version: Annotated[str, typer.Argument(help="Number of the version that becomes champion.")],
    reason: Reason,
    model: Model = DEFAULT_MODEL,
) -> dict[str, Any]:
    """Make a registered version the champion, whatever the gate decided."""
    from minicpmv_finetune.tracking.champion import promote as move

    return _printed(model, move(model, version, reason))


@app.command(rich_help_panel=PANEL)
@reported
def rollback(reason: Reason, model: Model = DEFAULT_MODEL) -> dict[str, Any]:
    """Make the champion's predecessor the champion again; a second call goes back one more version."""
    from minicpmv_finetune.tracking.champion import rollback as move

    return _printed(model, move(model, reason))


def _printed(model: str, sentence: str) -> dict[str, Any]:
    print(sentence)
    return {"model": model, "outcome": sentence}
