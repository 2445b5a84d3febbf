"""Each step as OpenShift runs it: as an unknown user of group 0 without a home, who may write to one folder only."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.step_commands import STEP_SECONDS, STEPS, read_result, step_command

pytestmark = pytest.mark.faults_only

USER = "1000660000"
READ_EVERYTHING = [
    "--inh-caps",
    "+dac_read_search",
    "--ambient-caps",
    "+dac_read_search",
]  # Python may be readable by root only
AS_UNKNOWN_USER = ["setpriv", "--reuid", USER, "--regid", "0", "--clear-groups", "--no-new-privs", *READ_EVERYTHING]
# The container runtime mounts a /dev/shm of 64 MB.
ONE_WRITABLE_FOLDER = (
    'mount -t tmpfs -o "$2" tmpfs /dev/shm && mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift 2 && '
    'exec "$@"'
)
USUAL_SHARED_MEMORY = "size=64m,mode=1777"


@pytest.fixture
def scratch(inputs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The writable folder; pytest's folders above it, and above the inputs, become readable for everyone."""
    scratch = tmp_path / "scratch"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base  # a worker of pytest-xdist has a folder of its own
    for readable in (inputs, (inputs / "base").resolve(), tmp_path):
        for folder in (readable, *readable.parents):
            if base in (folder, *folder.parents) or folder.name.startswith("pytest-"):
                folder.chmod(folder.stat().st_mode | 0o055)
    for folder in (scratch, scratch / "tmp", scratch / "out"):
        folder.mkdir()
        folder.chmod(0o775)
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs unshare and setpriv")
    if subprocess.run([*_confine(scratch), "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    return scratch


def _confine(folder: Path, shared_memory: str = USUAL_SHARED_MEMORY) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", ONE_WRITABLE_FOLDER, "sh", str(folder), shared_memory, *AS_UNKNOWN_USER]


@pytest.mark.parametrize("step", STEPS)
def test_an_unknown_user_without_a_home_can_run_a_step(step: str, inputs: Path, scratch: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in {"HOME", "USER", "LOGNAME"}},
        "TMPDIR": str(scratch / "tmp"),
        "XDG_CACHE_HOME": str(scratch / "tmp" / "cache"),
    }
    command = [*_confine(scratch), *step_command(step, inputs, scratch / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STEP_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = scratch / "out" / STEPS[step].result
    assert result.stat().st_uid == int(USER)
    if step in {"validate-data", "preprocess", "merge"}:
        assert read_result(result) == read_result(inputs / STEPS[step].result)


@pytest.mark.parametrize("shared_memory", ["size=64m,mode=755", "size=64k,mode=1777", "ro,size=64m,mode=1777"])
def test_unusable_shared_memory_is_named_before_the_first_step(shared_memory: str, inputs: Path, scratch: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp"), "XDG_CACHE_HOME": str(scratch / "tmp" / "cache")}
    command = [*_confine(scratch, shared_memory), *step_command("train", inputs, scratch / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STEP_SECONDS)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm: ")
    assert "`shared_memory` in a profile" in done.stderr
    assert "loss" not in done.stderr, "a step was computed"


def test_no_other_folder_is_writable(scratch: Path, tmp_path: Path) -> None:
    for path, code in ((scratch / "out" / "file", 0), (tmp_path / "file", 1)):
        assert subprocess.run([*_confine(scratch), "touch", str(path)], capture_output=True).returncode == code
