"""Sentences on terminals of several widths, on a dumb terminal, and in a pipe."""

import io
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Sequence

import pytest
from rich.table import Table

from minicpmv_finetune.terminal import WIDEST, console, print_sentence

COMMAND = "`minicpmv-finetune merge --base-model … --adapter …`"
SENTENCE = (
    f"error: merge: --base-model is missing, which has to be the model that was trained; type {COMMAND}, and give it "
    "/a/folder/with-hyphens/and/many/parts/whose/name/is/longer/than/a/line/of/any/terminal/has/room/for/so/it/stays."
)
PROGRAM = "import sys; sys.argv[0] = 'minicpmv-finetune'; from minicpmv_finetune.cli.main import main; main()"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_words_commands_and_paths_stay_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    print_sentence(SENTENCE, screen)
    lines = screen.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines) == SENTENCE
    assert sum(COMMAND in line for line in lines) == 1
    *others, path = lines
    assert path.startswith("  /a/folder")
    assert max(map(len, others)) <= min(columns, WIDEST)


@pytest.mark.parametrize("columns", ["60", "200"])
def test_lines_that_fit_and_lists_stay_as_they_are(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    screen = Terminal()
    print_sentence("error: 2 inputs are wrong.\n- a:  one.\n- b: two.", screen)
    assert screen.getvalue() == "error: 2 inputs are wrong.\n- a:  one.\n- b: two.\n"


def test_chinese_characters_take_two_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    screen = Terminal()
    print_sentence("错误 图片文件 无法读取 请检查", screen)
    assert screen.getvalue().splitlines() == ["错误 图片文件", "  无法读取 请检查"]


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_a_table_fits_the_terminal(columns: int, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    table = Table.grid()
    table.add_row("a name", SENTENCE)
    screen = Terminal()
    console(screen, color_system=None).print(table)
    widest = max(map(len, screen.getvalue().splitlines()))
    assert columns - len("minicpmv-finetune") < widest <= columns


def test_a_table_shows_brackets_and_colons_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "build/[bold]/:smile:/report.html"
    console().print(path)
    assert capsys.readouterr().out == f"{path}\n"


def test_a_pipe_gets_a_sentence_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_sentence(SENTENCE)
    assert capsys.readouterr().err == f"{SENTENCE}\n"


def _on_a_terminal(words: Sequence[str], columns: int, term: str) -> list[str]:
    """What a command writes to a real terminal of this width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=theirs, stderr=theirs, env={**environment, "TERM": term}
    ):
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1024)
            except OSError:  # on Linux, how the other side's end is reported
                break
            if not part:
                break
            shown += part
    os.close(ours)
    return shown.decode().replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize(("columns", "term"), [(60, "xterm-256color"), (60, "dumb"), (0, "xterm")])
def test_a_mistake_on_a_real_terminal(columns: int, term: str) -> None:
    assert (
        _on_a_terminal(["run", "--max_steps", "3"], columns, term)
        == {
            60: [
                "error: run: no option --max_steps; flags of the training are",
                "  given as --training-flags '{\"max_steps\": …}', see",
                "  `minicpmv-finetune run --help`.",
            ],
            0: [
                "error: run: no option --max_steps; flags of the training are given as",
                "  --training-flags '{\"max_steps\": …}', see `minicpmv-finetune run --help`.",
            ],
        }[columns]
    )
