import io
import os
import pty
import re
import threading

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.progress import progress, report_outcome


def show_progress(total: int) -> None:
    with progress("slicing", total, " images") as bar:
        for _ in range(total):
            bar.update()


def test_a_log_gets_complete_lines_with_rate_and_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.PROGRESS_SECONDS.name, "0")
    show_progress(3)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert [number for line in lines for number in re.findall(r"(\d)/3", line)] == ["0", "1", "2", "3", "3"]
    assert re.fullmatch(r"slicing +67% \|█+\S? *\| 2/3 +[\d.]+ images/s +00:00 left", lines[2])


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.PROGRESS_SECONDS.name, raising=False)
    show_progress(5000)
    first, last = capsys.readouterr().err.splitlines()
    assert "0/5000" in first
    assert "100%" in last


def test_an_interval_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.PROGRESS_SECONDS.name, "10s")
    with pytest.raises(UserError, match="'10s' is not a number of seconds"):
        progress("slicing", 3, " images")


def test_a_terminal_gets_one_line_that_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    reader, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr, os.fdopen(reader, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", stderr)
        show_progress(3)
        stderr.flush()
        text = ""
        # A read returns what the terminal has so far, which may be only a part.
        while "\n" not in text:
            text += screen.read(65536).decode()
    assert text.count("\r") >= 2
    assert text.count("\n") == 1
    assert "3/3" in text


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_dumb_terminal_gets_complete_lines_that_fit_it(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv(environment.PROGRESS_SECONDS.name, "0")
    show_progress(3)
    screen.flush()
    text = screen.buffer.getvalue().decode()
    assert "\r" not in text
    assert [number for line in text.splitlines() for number in re.findall(r"(\d)/3", line)] == ["0", "1", "2", "3", "3"]
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_time_left_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress("vision features", 12032, " samples", initial=1984) as bar:
        bar.set_postfix_str("loss 1.2345, 319 tok/s")
    screen.flush()
    lines = re.split(r"[\r\n]+", screen.buffer.getvalue().decode().strip())
    assert all(re.match(r"vision features +16% \|.*\| [\d:?]+ left", line) for line in lines)
    assert max(map(len, lines)) <= columns


def test_an_encoding_without_blocks_gets_a_bar_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stderr", screen)
    show_progress(3)
    screen.flush()
    assert b"3/3" in screen.buffer.getvalue()


def test_quiet_shows_neither_progress_nor_outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.QUIET.name, "1")
    show_progress(3)
    report_outcome("3 images")
    assert capsys.readouterr().err == ""


def test_a_bar_of_zero_units_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_progress(0)
    assert "0/0" in capsys.readouterr().err


def test_no_thread_is_left_running() -> None:
    before = set(threading.enumerate())
    show_progress(1)
    assert set(threading.enumerate()) <= before
