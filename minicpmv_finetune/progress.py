"""Progress that a person can watch: a bar on a terminal, a line now and then in a pod's log.

A carriage return that redraws a bar on a terminal makes one endless line in a log. So without a terminal each redraw
is a line of its own, at most one every `MINICPMV_FINETUNE_PROGRESS_SECONDS` (default 10); `minicpmv-finetune run` sets
a shorter interval and draws the lines of its steps as one live bar.
"""

import io
import shutil
import sys
from typing import Any, TextIO

from tqdm import tqdm

from minicpmv_finetune import environment

OUTCOME_MARK = "→ "
_WIDTH = 110
_FORMAT = "{desc}  {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}  {rate_fmt}  {remaining} left{postfix}"


class _LineStream(io.TextIOBase):
    """Writes what tqdm redraws in place as lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.replace("\r", "").rstrip()
        if line:
            self.stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


class _Bar(tqdm):
    monitor_interval = 0  # a thread that would watch for stalled bars; each update looks at the clock instead


def progress(description: str, total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """A bar with rate and time left.

    Args:
        description: what is being done, one or two words.
        total: number of units.
        unit: plural name of what is counted, such as " samples".
        **options: further arguments of tqdm.
    """
    terminal, size = sys.stderr.isatty(), shutil.get_terminal_size()
    return _Bar(
        total=total,
        desc=description,
        unit=unit,
        file=sys.stderr if terminal else _LineStream(sys.stderr),
        mininterval=0.1 if terminal else float(environment.PROGRESS_SECONDS.read()),
        miniters=1,
        # tqdm itself draws nothing on a terminal that does not tell its size, as those of containers often do not.
        ncols=min(size.columns, _WIDTH) if terminal else _WIDTH,
        nrows=size.lines,
        bar_format=_FORMAT,
        ascii=False,
        **options,
    )


def conclude(sentence: str) -> None:
    """Tell a step's outcome in one line, which `minicpmv-finetune run` shows beside the step's name."""
    print(f"{OUTCOME_MARK}{sentence}", file=sys.stderr, flush=True)
