"""The terminal lines of a local run: one line per step, drawn live from what kfp.local prints.

kfp.local prints everything that a step prints. All of it goes to a log file, and the terminal shows which step runs,
how far it is, and its outcome.
"""

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from minicpmv_finetune.progress import OUTCOME_MARK

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '(?P<step>[\w-]+)'")
_ENDED = re.compile(r"Task '(?P<step>[\w-]+)' finished with status (?P<status>\w+)")
_REMARKS = ("warning: ", "note: ")
_PROGRESS = re.compile(r"^\w[\w ]*?\s+\d+% \|")


@dataclass
class RunDisplay:
    """Shows a run on the terminal and records how it ended; a context manager.

    Attributes:
        log: Log file that receives every line.
        step: Name of the step that runs, or that failed.
        outcome: What the current step achieved, in its own words; empty while it runs.
        error: Last error message of the current step; empty if there is none.
        crashed: Whether the current step printed a traceback.
        seconds: Duration of each finished step.
        stream: Text stream that kfp.local's output must be written to.
    """

    log: TextIO
    step: str = ""
    outcome: str = ""
    error: str = ""
    crashed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    stream: io.TextIOBase = field(init=False)
    _progress: str = ""
    _started: float = 0.0

    def __post_init__(self) -> None:
        self.stream = _LineStream(self._read_line)
        # The present stdout, because `stream` replaces it while the steps run.
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, redirect_stdout=False)

    def __enter__(self) -> "RunDisplay":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence about the run itself, and log it."""
        self._console.print(Text(f"  {sentence}"))
        self.log.write(f"{sentence}\n")
        self.log.flush()

    def _read_line(self, raw: str) -> None:
        """Log a line, and update the display if the line concerns the step's progress or end."""
        line = _ANSI.sub("", raw).rstrip()
        self.log.write(f"{line}\n")
        self.log.flush()
        line = line.strip()
        if started := _STARTED.search(line):
            self.step, self.outcome, self._progress, self._started = started["step"], "", "", time.monotonic()
            self.error, self.crashed = "", False
        elif ended := _ENDED.search(line):
            self._end_step(ended["status"] == "SUCCESS")
        elif line.startswith(OUTCOME_MARK):
            self.outcome = line.removeprefix(OUTCOME_MARK)
        elif line.startswith("Traceback (most recent call last)"):
            self.crashed = True
        elif line.startswith("error: "):
            self.error = line.removeprefix("error: ")
        elif self.error and line.startswith("- "):  # one of several mistakes, each on a line
            self.error += f" {line.removeprefix('- ')}"
        elif line.startswith(_REMARKS):
            self.say(line)
        elif _PROGRESS.match(line):
            self._progress = line
        self._live.update(self._line("•", "cyan", self._progress or "starting …") if self.step else Text(""))

    def _end_step(self, succeeded: bool) -> None:
        seconds = time.monotonic() - self._started
        self.seconds[self.step] = round(seconds, 1)
        mark, color = ("✓", "green") if succeeded else ("✗", "red")
        self._console.print(self._line(mark, color, f"{self.outcome:<70} {seconds:5.0f} s"))
        self.step = "" if succeeded else self.step

    def _line(self, mark: str, color: str, text: str) -> Text:
        return Text.assemble((f"  {mark} ", color), (f"{self.step:<17}", "bold"), text)


class _LineStream(io.TextIOBase):
    """A text stream that passes every complete line to a function."""

    def __init__(self, read_line: Callable[[str], None]) -> None:
        self.read_line = read_line
        self.incomplete = ""

    def write(self, text: str) -> int:
        *lines, self.incomplete = (self.incomplete + text).split("\n")
        for line in lines:
            if line.strip():
                self.read_line(line)
        return len(text)
