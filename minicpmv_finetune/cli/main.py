"""The command line: the demonstration, the whole pipeline on this machine, every step on its own, and Kubeflow.

A user's mistake ends with one sentence and exit code 2, a temporary fault with exit code 75. Heavy libraries are
imported only when a command needs them, so that help and mistakes in arguments appear at once.
"""

import signal
import sys
from typing import Any

import typer

from minicpmv_finetune.errors import RetryableError, UserError, end_process, explain_disk_errors
from minicpmv_finetune.progress import quieten_libraries

from . import kubeflow, local, models, serving, steps

app = typer.Typer(
    name="minicpmv-finetune",
    help="Fine-tune MiniCPM-V with LoRA: as a Kubeflow pipeline, or completely on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for group in (local, serving, kubeflow, models, steps):
    app.add_typer(group.app)


def main() -> None:
    """Entry point of `minicpmv-finetune`."""
    quieten_libraries()
    if "--help" in sys.argv:
        show_option_names_whole()
    # After SIGTERM a step removes its incomplete output, as after an error; by default the process would end at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with explain_disk_errors():
            app()
    except (UserError, RetryableError) as error:
        end_process(error)
    except KeyboardInterrupt:
        sys.exit(130)


def show_option_names_whole() -> None:
    """Let the help break descriptions, not the names of options, where a terminal is narrow.

    Rich makes the two widest columns of a table narrower until the table fits, and typer lets it. It would end a long
    word of a description, such as the name of an environment variable, with an ellipsis; here the word is broken.
    """
    import typer.rich_utils
    from rich.columns import Columns
    from rich.measure import Measurement
    from rich.table import Table

    class Folded:
        def __init__(self, part: Any) -> None:
            self.part = part

        def __rich_console__(self, console: Any, options: Any) -> Any:
            yield from console.render(self.part, options.update(overflow="fold"))

        def __rich_measure__(self, console: Any, options: Any) -> Measurement:
            return Measurement.get(console, options, self.part)

    class NamesWhole(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            if not self.columns:
                # The last two columns are the type and the description.
                for number in range(len(cells)):
                    self.add_column(no_wrap=number < len(cells) - 2, overflow="fold")
            # A description's parts, such as the name of an environment variable, are a table of their own.
            if isinstance(cells[-1], Columns):
                cells[-1].renderables = [Folded(part) for part in cells[-1].renderables]
            super().add_row(*cells, **options)

    typer.rich_utils.Table = NamesWhole  # type: ignore[misc]
