"""A full disk ends each step with one sentence and exit code 75, and leaves no result that looks complete."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.step_commands import STEP_SECONDS, STEPS, step_command


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the permission to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "step",
    ["preprocess", *(pytest.param(step, marks=pytest.mark.faults_only) for step in STEPS if step != "preprocess")],
)
def test_a_full_disk_ends_a_step_in_one_sentence(
    step: str, inputs_of: Callable[[str], Path], small_disk: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        step_command(step, inputs_of(step), small_disk),
        env=environment,
        capture_output=True,
        text=True,
        timeout=STEP_SECONDS,
    )
    assert done.returncode == 75, done.stderr
    assert re.match("error: .*no space (is )?left on", done.stderr.splitlines()[-1], re.IGNORECASE)
    assert "Traceback" not in done.stderr
    assert not (small_disk / STEPS[step].result).exists()
