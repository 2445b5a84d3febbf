"""Folders that appear under their final name only when they are complete."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minicpmv_finetune.errors import UserError


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `final` only when the block ends without an error.

    An existing file or folder of that name is replaced as a whole. The staging folder is a hidden folder beside it, so
    that the last step is a rename within one file system.

    Raises:
        UserError: The folder cannot be created.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise UserError(f"{final}: cannot be written ({error.strerror}); choose another folder.") from error
    try:
        yield staging
        make_readable(staging)
        swap_in(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Let everybody read a folder's files; safetensors makes its files readable by their owner only."""
    folder.chmod(0o755)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | 0o044)


def swap_in(staging: Path, final: Path) -> None:
    """Give a finished folder its final name, in place of what has this name."""
    # Renamed first and deleted last, so that nobody finds a half-deleted folder under the final name.
    outgoing = staging.with_name(f"{staging.name}.replaced")
    with suppress(FileNotFoundError):  # there is nothing, or another attempt of the same step is renaming it
        final.rename(outgoing)
    staging.rename(final)
    if outgoing.is_dir():
        shutil.rmtree(outgoing, ignore_errors=True)
    else:
        outgoing.unlink(missing_ok=True)
