"""Each step as OpenShift would run it: an unknown user of group 0 without a home, who may write to one folder alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.steps import STEPS, command_of, content

pytestmark = pytest.mark.faults_only

USER = "1000660000"
READS_ALL = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]  # Python may be root's alone
AS_STRANGER = ["setpriv", "--reuid", USER, "--regid", "0", "--clear-groups", "--no-new-privs", *READS_ALL]
ONE_FOLDER = 'mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift && exec "$@"'


@pytest.fixture
def scratch(inputs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder; pytest's own folders above it, and above what is read, are opened."""
    scratch = tmp_path / "scratch"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base  # of several workers
    for read in (inputs, (inputs / "base").resolve(), tmp_path):
        for folder in (read, *read.parents):
            if base in (folder, *folder.parents) or folder.name.startswith("pytest-"):
                folder.chmod(folder.stat().st_mode | 0o055)
    for folder in (scratch, scratch / "tmp", scratch / "out"):
        folder.mkdir()
        folder.chmod(0o775)
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs unshare and setpriv")
    if subprocess.run([*_confined(scratch), "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    return scratch


def _confined(folder: Path) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", ONE_FOLDER, "sh", str(folder), *AS_STRANGER]


@pytest.mark.parametrize("step", STEPS)
def test_a_stranger_without_a_home_may_run_it(step: str, inputs: Path, scratch: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if name not in {"HOME", "USER", "LOGNAME"}},
        "TMPDIR": str(scratch / "tmp"),
        "XDG_CACHE_HOME": str(scratch / "tmp" / "cache"),
    }
    command = [*_confined(scratch), *command_of(step, inputs, scratch / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = scratch / "out" / STEPS[step][1]
    assert result.stat().st_uid == int(USER)
    if step in {"validate-data", "preprocess", "merge"}:
        assert content(result) == content(inputs / STEPS[step][1])


def test_the_rest_of_the_system_is_closed(scratch: Path, tmp_path: Path) -> None:
    for place, code in ((scratch / "out" / "file", 0), (tmp_path / "file", 1)):
        assert subprocess.run([*_confined(scratch), "touch", str(place)], capture_output=True).returncode == code
