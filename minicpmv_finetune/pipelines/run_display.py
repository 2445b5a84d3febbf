"""The terminal lines of a local run: one aligned line per step, drawn live from what kfp.local prints.

kfp.local prints everything that a step prints. All of it goes to a log file, and the terminal shows which step runs,
how far it is, and its outcome. Where nothing can be redrawn, as in a pipe or a dumb terminal, a step that takes long
prints a line of its progress from time to time.
"""

import io
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minicpmv_finetune import environment
from minicpmv_finetune.progress import OUTCOME_MARK, seconds_between_lines, shows_unicode
from minicpmv_finetune.terminal import WIDEST, console, print_sentence

FINISHED_BEFORE = "finished before: "
"""How the outcome of a step begins that an earlier attempt has finished."""
REUSED = "reused"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '(?P<step>[\w-]+)'")
_ENDED = re.compile(r"Task '(?P<step>[\w-]+)' finished with status (?P<status>\w+)")
_REMARKS = ("warning: ", "note: ")
_PROGRESS = re.compile(
    r"^(?P<what>\w[\w ]*?)\s+(?P<percent>\d+)% \|.*\| (?P<counts>\S+/\S+)\s+(?P<rate>\S.*?)\s+(?P<left>[\d:?]+) left"
)
_WIDTH_IN_A_FILE = 97
_NAME = 14  # columns of a step's name, at least
_TIME = 6
_BAR = 24
_FREE = 3  # columns at the end of the running step's line, where a terminal writes the ^C of Ctrl-C


@dataclass
class RunDisplay:
    """Shows a run on the terminal and records how it ended; a context manager.

    Attributes:
        log: Log file that receives every line.
        steps: Names of the run's steps, by the longest of which the lines are aligned.
        to: Where the run is shown; the present stdout, because `stream` replaces it while the steps run.
        quiet: Show nothing but warnings, which go to stderr.
        seconds_between_lines: Time between two lines of a step's progress where no line can be redrawn.
        step: Name of the step that runs, or that failed.
        outcome: What the current step achieved, in its own words; empty while it runs.
        error: Last error message of the current step; empty if there is none.
        crashed: Whether the current step printed a traceback.
        seconds: Duration of each finished step.
        stream: Text stream that kfp.local's output must be written to.
    """

    log: TextIO
    steps: Sequence[str] = ()
    to: TextIO = field(default_factory=lambda: sys.stdout)
    quiet: bool = field(default_factory=lambda: bool(environment.QUIET.read()))
    seconds_between_lines: float = field(default_factory=seconds_between_lines)
    step: str = ""
    outcome: str = ""
    error: str = ""
    crashed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    stream: io.TextIOBase = field(init=False)
    _progress: "re.Match[str] | None" = None
    _started: float = 0.0
    _last_line: float = 0.0

    def __post_init__(self) -> None:
        self.stream = _LineStream(self._read_line)
        self._console = console(self.to, quiet=self.quiet)
        self._marks = "•✓✗" if shows_unicode(self.to) else "*+x"
        self._live = Live(
            console=self._console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),
            get_renderable=self._current,
        )

    def __enter__(self) -> "RunDisplay":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence about the run itself, and log it."""
        if self.quiet and sentence.startswith("warning: "):
            print_sentence(sentence)
        if self._console.is_terminal:
            self._console.print(Padding(Text(sentence), (0, 0, 0, 2), expand=False))
        else:
            self._console.print(Text(f"  {sentence}"), soft_wrap=True)
        self.log.write(f"{sentence}\n")
        self.log.flush()

    def _read_line(self, raw: str) -> None:
        """Log a line, and update the display if the line concerns the step's progress or end."""
        line = _ANSI.sub("", raw).rstrip()
        self.log.write(f"{line}\n")
        self.log.flush()
        line = line.strip()
        if started := _STARTED.search(line):
            self.step, self.outcome, self._progress = started["step"], "", None
            self._started = self._last_line = time.monotonic()
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
        elif progress := _PROGRESS.match(line):
            self._progress = progress
            self._print_progress()

    def _print_progress(self) -> None:
        """Print a line from time to time where none can be redrawn."""
        now = time.monotonic()
        if not self._console.is_interactive and now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            self._console.print(self._current(), soft_wrap=True)

    def _end_step(self, succeeded: bool) -> None:
        seconds = time.monotonic() - self._started
        self.seconds[self.step] = round(seconds, 1)
        mark, color = (self._marks[1], "green") if succeeded else (self._marks[2], "red")
        step, self.step = self.step, ""  # no live line while this one is printed
        duration = REUSED if self.outcome.startswith(FINISHED_BEFORE) else _duration(seconds)
        line = self._line(mark, color, step, self.outcome.removeprefix(FINISHED_BEFORE), duration)
        self._console.print(line, soft_wrap=not self._console.is_terminal)
        self.step = "" if succeeded else step

    def _current(self) -> "Table | Text":
        """The line of the running step."""
        if not self.step:
            return Text("")
        duration = _duration(time.monotonic() - self._started)
        room = self._width() - _FREE - 4 - self._name_width - _TIME - 1
        text = progress_text(self._progress, self.step, room, self._marks[1] == "✓") if self._progress else "starting"
        return self._line(self._marks[0], "cyan", self.step, text, duration, one_line=True)

    def _line(
        self, mark: str, color: str, step: str, text: str, duration: str, one_line: bool = False
    ) -> "Table | Text":
        """A step's line: in a terminal its text is broken at words, and the time is at the right end."""
        if not self._console.is_terminal:
            plain = f"  {mark} {step:<{self._name_width}}{text}"
            return Text(f"{plain:<{_WIDTH_IN_A_FILE - _TIME}} {duration:>{_TIME}}")
        line = Table.grid()
        line.width = self._width() - (_FREE if one_line else 0)
        line.add_column(width=4)
        line.add_column(width=self._name_width)
        line.add_column(ratio=1, no_wrap=one_line, overflow="crop" if one_line else "fold")
        line.add_column(width=_TIME + 1, justify="right", no_wrap=True)
        line.add_row(Text(f"  {mark} ", color), Text(step, "bold"), Text(text), Text(f" {duration}"))
        return line

    def _width(self) -> int:
        return min(self._console.width, WIDEST) if self._console.is_terminal else _WIDTH_IN_A_FILE

    @property
    def _name_width(self) -> int:
        return max(_NAME, *map(len, (*self.steps, self.step))) + 1


def progress_text(progress: "re.Match[str]", step: str, room: int, unicode: bool) -> str:
    """A step's progress in this number of columns; what matters least is left out first.

    Args:
        progress: The line that the step printed.
        step: Name of the step.
        room: Number of columns.
        unicode: Whether the terminal shows blocks.
    """
    what = "" if progress["what"] in step else f"{progress['what']}  "
    percent, left = f"{progress['percent']:>3}%", f"{progress['left']} left"
    more = ["", f"  {progress['counts']}", f"  {progress['counts']}  {progress['rate']}"]
    for least, rest in ((_BAR // 2, more[2]), (_BAR // 2, more[1]), (_BAR // 4, more[0])):
        space = room - len(f"{what}{percent}    {left}{rest}")
        if space >= least:
            width = min(space, _BAR)
            full = round(int(progress["percent"]) / 100 * width)
            bar = ("█" if unicode else "#") * full
            return f"{what}{percent} |{bar:<{width}}| {left}{rest}"
    return f"{percent}  {left}"


def _duration(seconds: float) -> str:
    """A time in at most six columns."""
    if seconds < 1000:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


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
