"""`minicpmv-finetune train --print-plan`: the plan of a training as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.print_plan import plan_training


def show_plan(flags: Sequence[str]) -> None:
    """Print what the flags would train, freeze and save."""
    parts, saved = plan_training(parse(flags))
    table = Table(box=None)
    for heading, justify in (("part", "left"), ("parameters", "right"), ("trained", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for part in parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trained:,}", part.how)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\nSaved: {saved}")
