"""How training processes report to the launcher why they ended, and how far they were.

They share a folder that the launcher names in the environment. `error` contains a sentence for a person. `exit_code`
contains the exit code of a process that ended for a known reason: torchrun starts such a process again, and the new
process, which would fail in the same way, ends at once with that code. `cause` contains the last line of a traceback
that was printed. `progress-N` contains the step and stage of process N. A process that was killed leaves no
`exit_code`, and its successor continues from a checkpoint.
"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import first_line

ERROR_FILE, EXIT_CODE_FILE, CAUSE_FILE = "error", "exit_code", "cause"


def exit_folder() -> Path | None:
    """The shared folder; None if another program than our launcher has started torchrun."""
    named = environment.WORKER_EXIT_FOLDER.read()
    return Path(named) if named else None


def repeat_exit() -> None:
    """End a restarted process if its predecessor ended for a known reason; otherwise delete the old error.

    Raises:
        SystemExit: With the predecessor's exit code.
    """
    folder = exit_folder()
    if folder is None:
        return
    if (folder / EXIT_CODE_FILE).exists():
        sys.exit(int((folder / EXIT_CODE_FILE).read_text() or "1"))
    if environment.LOCAL_RANK.read() == "0":
        (folder / ERROR_FILE).unlink(missing_ok=True)


def record_exit(code: int, error: str = "", restart: bool = False) -> bool:
    """Record why this process ends; the first reason that any process of this machine records counts.

    Args:
        code: Exit code.
        error: Sentence for a person; empty if the process prints a traceback.
        restart: Whether torchrun's next attempt may succeed.

    Returns:
        False if there is no launcher that would read it.
    """
    folder = exit_folder()
    if folder is None:
        return False
    if error and not (folder / ERROR_FILE).exists():
        (folder / ERROR_FILE).write_text(error)
    if not restart and not (folder / EXIT_CODE_FILE).exists():
        (folder / EXIT_CODE_FILE).write_text(str(code))
    return True


def record_crash(error: Exception) -> None:
    """Record that a bug ends this process, whose traceback is printed: another attempt would end so again."""
    folder = exit_folder()
    if record_exit(1) and folder and not (folder / CAUSE_FILE).exists():
        kind, message = type(error).__name__, first_line(error)
        (folder / CAUSE_FILE).write_text(kind if message == kind else f"{kind}: {message[:300]}")


def has_failed() -> bool:
    """Whether a process of this machine has recorded why it ends."""
    folder = exit_folder()
    return folder is not None and ((folder / ERROR_FILE).exists() or (folder / EXIT_CODE_FILE).exists())


def signal_name(number: int) -> str:
    """How a person calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@dataclass(frozen=True)
class StepProgress:
    """The position of a training process.

    Attributes:
        rank: Rank of the process.
        step: Number of the step that the process is in, from 1.
        stage: Stage of the step, an index of the watchdog's `STAGES`.
        age: Seconds since the process's watchdog last wrote; a frozen process no longer writes.
    """

    rank: int
    step: int
    stage: int
    age: float = 0.0


def write_progress(progress: StepProgress) -> None:
    """Record the position of this process, if there is a launcher."""
    if folder := exit_folder():
        (folder / f"progress-{progress.rank}").write_text(f"{progress.rank} {progress.step} {progress.stage}")


def read_progress(folder: Path) -> list[StepProgress]:
    """The last recorded positions of all processes."""
    now = time.time()
    found = []
    for file in folder.glob("progress-*"):
        rank, step, stage = file.read_text().split() or ("0", "0", "0")
        found.append(StepProgress(int(rank), int(step), int(stage), now - file.stat().st_mtime))
    return found
