"""The commands that move the champion by hand."""

from typing import Annotated

import typer

from .options import Model

PANEL = "Models"
app = typer.Typer()
Reason = Annotated[str, typer.Option(help="Why; it is kept beside the move.")]


@app.command(rich_help_panel=PANEL)
def promote(
    version: Annotated[str, typer.Argument(help="Number of the version that becomes champion.")],
    reason: Reason,
    model: Model = "minicpmv-finetune",
) -> None:
    """Make a registered version champion by hand, whatever the gate decided."""
    from minicpmv_finetune.tracking.champion import promote as move

    print(move(model, version, reason))


@app.command(rich_help_panel=PANEL)
def rollback(reason: Reason, model: Model = "minicpmv-finetune") -> None:
    """Make the champion's predecessor champion again; repeated, the one before that."""
    from minicpmv_finetune.tracking.champion import rollback as move

    print(move(model, reason))
