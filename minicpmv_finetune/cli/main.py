"""The command line: the demonstration, the whole pipeline on this machine, every step on its own, and Kubeflow.

A user's mistake ends with one sentence and exit code 2, a temporary fault with exit code 75. Heavy libraries are
imported only when a command needs them, so that help and mistakes in arguments appear at once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from minicpmv_finetune.errors import RetryableError, UserError, end_process, explain_disk_errors

from . import kubeflow, local, models, steps

app = typer.Typer(
    name="minicpmv-finetune",
    help="Fine-tune MiniCPM-V with LoRA: as a Kubeflow pipeline, or completely on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for group in (local, kubeflow, models, steps):
    app.add_typer(group.app)


def main() -> None:
    """Entry point of `minicpmv-finetune`."""
    _quieten_libraries()
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

    Rich makes the two widest columns of a table narrower until the table fits, and typer lets it.
    """
    import typer.rich_utils
    from rich.table import Table

    class NamesWhole(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            if not self.columns:
                # The last two columns are the type and the description.
                for number in range(len(cells)):
                    self.add_column(no_wrap=number < len(cells) - 2, overflow="fold")
            super().add_row(*cells, **options)

    typer.rich_utils.Table = NamesWhole  # type: ignore[misc]


def _quieten_libraries() -> None:
    """Disable progress bars and warnings of libraries before they are imported.

    This program shows its own progress, and uses a CPU on purpose where there is no GPU.
    """
    # Progress bars, and warnings that reference kernels run where there is no GPU.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The hub's client reports each of its attempts; the error at the end says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not Path("/dev/nvidiactl").exists():
        # Without this setting DeepSpeed warns that it falls back to the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
