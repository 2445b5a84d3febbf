"""Progress of a step: a bar on a terminal, a line from time to time in a pod's log.

The carriage returns that redraw a bar on a terminal make one endless line in a log. So in a log, a pipe and a dumb
terminal each redraw is a line of its own, at most one every `MINICPMV_FINETUNE_PROGRESS_SECONDS` (default 10).
`minicpmv-finetune run` sets a shorter interval and draws the lines of its steps as one live bar.
"""

import io
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

from .terminal import WIDEST, console, print_sentence

if TYPE_CHECKING:
    from tqdm import tqdm

OUTCOME_MARK = "→ "
_LOG_FORMAT = "{desc}  {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}  {rate_fmt}  {remaining} left{postfix}"
# A terminal may be narrow: the bar gives way first, and what stands last is cut off.
_TERMINAL_FORMAT = "{desc}  {percentage:3.0f}% |{bar}| {remaining} left  {n_fmt}/{total_fmt}  {rate_fmt}{postfix}"


class _LineStream(io.TextIOBase):
    """Writes each redraw of a tqdm bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.replace("\r", "").rstrip()
        if line:
            self.stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def progress(description: str, total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """A progress bar with rate and remaining time.

    Args:
        description: Name of the work, one or two words.
        total: Number of units.
        unit: Plural name of the unit, such as " samples".
        **options: Further arguments of tqdm.

    Raises:
        UserError: The variable for the interval contains no number.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # starts no thread that watches for stalled bars; each update reads the clock instead

    terminal, size = sys.stderr.isatty(), shutil.get_terminal_size()
    redraws = terminal and not console(sys.stderr).is_dumb_terminal
    return Bar(
        total=total,
        desc=description,
        unit=unit,
        file=sys.stderr if redraws else _LineStream(sys.stderr),
        mininterval=0.1 if redraws else seconds_between_lines(),
        miniters=1,
        # tqdm itself draws nothing on a terminal that reports no size, which is common in containers.
        ncols=min(size.columns, WIDEST) if terminal else WIDEST,
        nrows=size.lines,
        bar_format=_TERMINAL_FORMAT if terminal else _LOG_FORMAT,
        ascii=not shows_unicode(sys.stderr),
        disable=bool(environment.QUIET.read()),
        **options,
    )


def seconds_between_lines() -> float:
    """The time between two lines of progress where there is no terminal."""
    text = environment.PROGRESS_SECONDS.read()
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{environment.PROGRESS_SECONDS}: {text!r} is not a number of seconds; correct it.") from None


def shows_unicode(stream: TextIO) -> bool:
    """Whether a stream has an encoding for blocks, check marks and all other characters."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def report_outcome(sentence: str) -> None:
    """Print a step's outcome in one line, which `minicpmv-finetune run` shows beside the step's name."""
    if not environment.QUIET.read():
        print_sentence(f"{OUTCOME_MARK}{sentence}")


def quieten_libraries() -> None:
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
