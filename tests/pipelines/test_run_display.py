"""The lines of a local run, as terminals of several widths, a dumb terminal and a pipe show them."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from minicpmv_finetune import environment
from minicpmv_finetune.pipelines.run_display import RunDisplay

BAR = "train    {percent}% |████████                | {done}/12032  24.13 samples/s  08:21 left, loss 1.2345, 319 tok/s"


class Screen(io.TextIOWrapper):
    """A terminal, or a file."""

    def __init__(self, is_terminal: bool = True, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def shown(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


def play(screen: Screen, log: io.StringIO | None = None, seconds_between_lines: float = 10.0) -> RunDisplay:
    """Show a run whose last step fails."""
    display = RunDisplay(log or io.StringIO(), to=screen, seconds_between_lines=seconds_between_lines)
    with display:
        display.say("going on with the unfinished run minicpmv-finetune-20261126-222918-abcd; --fresh starts over")
        for lines in (
            "Executing task 'validate-data'\n→ 1,497 samples to train on, 300 to evaluate, 0 rejected\n"
            "warning: none of the 2 samples shows an image\n"
            "Task 'validate-data' finished with status SUCCESS\n",
            "Executing task 'preprocess'\n→ finished before: 1,797 slices and 62,895 tokens in 0.5 MB of shards\n"
            "Task 'preprocess' finished with status SUCCESS\n",
            f"Executing task 'train'\n{BAR.format(percent=16, done=1984)}\n",
        ):
            display.stream.write(lines)
        display._live.refresh()
        display.stream.write("error: the disk is full\nTask 'train' finished with status FAILURE\n")
    return display


def lines_of(text: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", text)]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", environment.QUIET.name):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("columns", [60, 80, 110, 200])
def test_each_step_is_one_aligned_line_with_the_time_left(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    play(screen)
    lines = lines_of(screen.shown())
    assert max(map(cell_len, lines)) <= columns
    width = min(columns, 110)
    ended = [line for line in lines if line.startswith(("  ✓", "  ✗"))]
    assert [line.split()[1] for line in ended] == ["validate-data", "preprocess", "train"]
    assert {len(line) for line in ended} == {width}  # the times are at the same column
    assert [line[-6:].strip() for line in ended] == ["0 s", "reused", "0 s"]
    assert {line[19:20] != " " for line in ended[:2]} == {True}  # and so are the outcomes
    running = next(line for line in lines if "16%" in line)
    assert running.startswith("  • train           16% |█")
    assert "| 08:21 left" in running
    assert len(running) == width - len("^C") - 1  # which a terminal writes behind it
    assert ("1984/12032" in running) == (columns >= 80)
    # What does not fit beside the time goes on below.
    outcomes = [line[19:-7] if "✓" in line else line[19:] for line in lines if line[:4] in ("  ✓ ", "    ")]
    assert "1,497 samples to train on, 300 to evaluate, 0 rejected" in " ".join(" ".join(outcomes).split())


def test_a_long_name_of_a_step_moves_all_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    with RunDisplay(io.StringIO(), ("validate-data", "plan-retraining"), screen) as display:
        for step in display.steps:
            display.stream.write(f"Executing task '{step}'\n→ done\nTask '{step}' finished with status SUCCESS\n")
    assert {line.index("done") for line in lines_of(screen.shown()) if "✓" in line} == {len("  ✓ plan-retraining ")}


def test_the_outcomes_of_the_demo_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    play(screen)
    lines = lines_of(screen.shown())
    assert "  ✓ validate-data  1,497 samples to train on, 300 to evaluate, 0 rejected    0 s" in lines
    assert "  ✓ preprocess     1,797 slices and 62,895 tokens in 0.5 MB of shards     reused" in lines


@pytest.mark.parametrize(("term", "no_color"), [("xterm-256color", "1"), ("dumb", "")])
def test_colors_are_left_out_where_they_are_not_wanted(
    term: str, no_color: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    play(screen)
    shown = screen.shown()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)
    assert ("\x1b" in shown) == (term != "dumb")


@pytest.mark.parametrize("kind", ["pipe", "dumb"])
def test_a_long_step_prints_its_progress_where_no_line_can_be_redrawn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    screen = Screen(is_terminal=kind == "dumb")
    play(screen, seconds_between_lines=0)
    shown = screen.shown()
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert [line for line in shown.splitlines() if "16%" in line and "08:21 left" in line]
    screen = Screen(is_terminal=kind == "dumb")
    play(screen, seconds_between_lines=10)
    assert "16%" not in screen.shown()


def test_a_pipe_gets_each_outcome_whole_on_one_line() -> None:
    screen = Screen(is_terminal=False)
    play(screen)
    lines = screen.shown().splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"  ✓ validate-data  1,497 samples to train on, 300 to evaluate, 0 rejected +0 s", lines[2])
    assert lines[0].endswith("--fresh starts over")


def test_an_encoding_without_check_marks_is_enough() -> None:
    screen = Screen(is_terminal=False, encoding="ascii")
    play(screen, seconds_between_lines=0)
    assert "+ validate-data" in screen.shown()
    assert "x train" in screen.shown()


def test_quiet_shows_only_warnings_and_logs_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.QUIET.name, "1")
    screen, log = Screen(), io.StringIO()
    display = play(screen, log)
    assert lines_of(screen.shown()) == [""]
    assert capsys.readouterr().err == "warning: none of the 2 samples shows an image\n"
    assert "1,497 samples" in log.getvalue()
    assert display.error == "the disk is full"


def test_a_step_that_has_not_said_anything_shows_its_time() -> None:
    screen = Screen()
    display = RunDisplay(io.StringIO(), to=screen)
    with display:
        display.stream.write("Executing task 'evaluate'\n")
        console = Console(file=Screen(is_terminal=False), width=80)
        with console.capture() as captured:
            console.print(display._current())
    assert re.fullmatch(r"  • evaluate       starting +0 s", captured.get().rstrip())
