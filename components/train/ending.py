"""How training processes tell the one that started them why they ended, and how far they were.

They share a folder that the launcher names in the environment. `sentence` is for a person; `verdict` holds the exit
code of a process that knew why it ended, so that torchrun's restart of it, which would find the same, ends at once;
`place-N` says where process N is. One that was killed leaves no verdict, and its restart goes on from a checkpoint.
"""

import os
import sys
from pathlib import Path

FOLDER_VARIABLE = "MINICPMV_ENDING_FOLDER"


def ending_folder() -> Path | None:
    """The folder, or None where torchrun was started by someone else."""
    named = os.environ.get(FOLDER_VARIABLE)
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
    if os.environ.get("LOCAL_RANK", "0") == "0":
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
