"""How training processes tell the one that started them why they ended, and how far they were.

They share a folder that the launcher names in the environment. `sentence` is for a person; `verdict` holds the exit
code of a process that knew why it ended, so that torchrun's restart of it, which would find the same, ends at once;
`place-N` says where process N is. One that was killed leaves no verdict, and its restart goes on from a checkpoint.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune import environment


def ending_folder() -> Path | None:
    """The folder, or None where torchrun was started by someone else."""
    named = environment.WORKER_EXIT_FOLDER.read()
    return Path(named) if named else None


def end_again() -> None:
    """End a restarted process as the one before it did, if that knew why; else forget what that said.

    Raises:
        SystemExit: with its exit code.
    """
    folder = ending_folder()
    if folder is None:
        return
    if (folder / "verdict").exists():
        sys.exit(int((folder / "verdict").read_text() or "1"))
    if environment.LOCAL_RANK.read() == "0":
        (folder / "sentence").unlink(missing_ok=True)


def leave(code: int, sentence: str = "") -> bool:
    """Write down why this process ends; False where nobody would read it."""
    folder = ending_folder()
    if folder is None:
        return False
    if sentence:
        (folder / "sentence").write_text(sentence)
    (folder / "verdict").write_text(str(code))
    return True


@dataclass(frozen=True)
class Place:
    """Where a process was when it last moved.

    Attributes:
        rank: of the process.
        step: it is in, from 1.
        stage: of the step, as the watchdog counts them.
        seen: seconds since its watchdog last wrote; a frozen process writes no more.
    """

    rank: int
    step: int
    stage: int
    seen: float = 0.0


def note_place(place: Place) -> None:
    """Write down where this process is."""
    if folder := ending_folder():
        (folder / f"place-{place.rank}").write_text(f"{place.rank} {place.step} {place.stage}")


def read_places(folder: Path) -> list[Place]:
    """Where the processes are that wrote it down."""
    now = time.time()
    places = []
    for file in folder.glob("place-*"):
        rank, step, stage = file.read_text().split() or ("0", "0", "0")
        places.append(Place(int(rank), int(step), int(stage), now - file.stat().st_mtime))
    return places
