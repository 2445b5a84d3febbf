"""The git commit of the running code, which a training records."""

import os
import subprocess
from pathlib import Path

from . import environment

_PACKAGE = Path(__file__).parent
_TIMEOUT = 5  # seconds for one git command


def git_commit() -> str:
    """Return the commit of this code: the one that the container image names, or else that of the git checkout.

    Returns:
        The commit's full hash; "unknown" if the package runs neither from an image nor from a checkout.
    """
    commit = environment.GIT_COMMIT.read()
    return commit if commit != environment.GIT_COMMIT.default else commit_of_checkout(_PACKAGE) or commit


def commit_of_checkout(package: Path) -> str:
    """Ask git for the commit of a package's folder.

    Args:
        package: Folder that contains `__init__.py`.

    Returns:
        The commit's full hash. Empty if git does not track the package's own files, as in a virtual environment that
        is inside another project's checkout, or if git is missing or does not answer.
    """
    # GIT_DIR and the like, which are set inside a git hook, would lead to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def run_git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=_TIMEOUT)  # noqa: S603
        return done.stdout.strip()

    try:
        run_git("ls-files", "--error-unmatch", "__init__.py")
        return run_git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return ""
