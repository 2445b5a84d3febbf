"""The command line: the demonstration, the whole pipeline on this machine, every step on its own, and Kubeflow.

A user's mistake ends with one sentence and exit code 2, a temporary fault with exit code 75. Heavy libraries are
imported only when a command needs them, so that help and mistakes in arguments appear at once.
"""

import logging
import os
import signal
import sys
from pathlib import Path

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
    # After SIGTERM a step removes its incomplete output, as after an error; by default the process would end at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with explain_disk_errors():
            app()
    except (UserError, RetryableError) as error:
        end_process(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _quieten_libraries() -> None:
    """Disable progress bars and warnings of libraries before they are imported.

    This program shows its own progress, and uses a CPU on purpose where there is no GPU.
    """
    # Progress bars, and warnings that reference kernels run where there is no GPU.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The hub's client reports each of its attempts; the error at the end says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # A recommendation of kernels for a CPU, on which this program is only tried out.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not Path("/dev/nvidiactl").exists():
        # Without this setting DeepSpeed warns that it falls back to the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
