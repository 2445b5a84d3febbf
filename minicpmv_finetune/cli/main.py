"""The command line: the demonstration, the whole pipeline on this machine, every step on its own, and Kubeflow.

A user's mistake ends with one sentence and exit code 2, a temporary fault with exit code 75. Heavy libraries are
imported only when a command needs them, so that help and mistakes in arguments appear at once.
"""

import io
import signal
import sys
from typing import Annotated, Any

import typer

from minicpmv_finetune.cores import share_cores
from minicpmv_finetune.errors import RetryableError, UserError, end_process, explain_disk_errors
from minicpmv_finetune.progress import quieten_libraries, shows_unicode
from minicpmv_finetune.terminal import WIDEST

from . import kubeflow, local, models, serving, steps
from .help import Command, Group
from .usage import usage_sentence

GREETING = """\
Fine-tune MiniCPM-V with LoRA: as a Kubeflow pipeline, or
completely on this machine.

  minicpmv-finetune demo
      the whole pipeline on handwritten digits, in minutes,
      without a download or a GPU

  minicpmv-finetune run --data train.json --out build/mine
      the same on your data, up to an evaluated model

`minicpmv-finetune --help` lists all commands."""

_STOPPED = 128 + signal.SIGINT

app = typer.Typer(
    name="minicpmv-finetune",
    help="Fine-tune MiniCPM-V with LoRA: as a Kubeflow pipeline, or completely on this machine.",
    cls=Group,
    context_settings={"max_content_width": WIDEST},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (local, serving, kubeflow, models, steps):
    app.add_typer(group.app)
for commands in (local.app, serving.app, kubeflow.app, kubeflow.schedule_app, models.app, steps.app):
    for command in commands.registered_commands:
        if command.cls is None or not issubclass(command.cls, Command):
            command.cls = Command


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"minicpmv-finetune {version('minicpmv-finetune')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def greet(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Greet with the two commands that matter, if no command is given."""
    if context.invoked_subcommand is None:
        print(GREETING)


def main() -> None:
    """Entry point of `minicpmv-finetune`."""
    quieten_libraries()
    share_cores()
    for stream in (sys.stdout, sys.stderr):
        # In an encoding without these characters, an answer or a check mark must not end the program.
        if isinstance(stream, io.TextIOWrapper) and not shows_unicode(stream):
            stream.reconfigure(errors="backslashreplace")
    # After SIGTERM a step removes its incomplete output, as after an error; by default the process would end at once.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with explain_disk_errors():
            code: Any = app(prog_name=app.info.name, standalone_mode=False)
    except (UserError, RetryableError) as error:
        end_process(error)
    except KeyboardInterrupt:
        code = _STOPPED
    except Exception as error:
        if sentence := usage_sentence(error):
            end_process(UserError(sentence))
        raise
    if code == _STOPPED:
        print("\nstopped", file=sys.stderr)
    # The code of an exit that the library asks for, such as after --help.
    sys.exit(code if isinstance(code, int) else 0)
