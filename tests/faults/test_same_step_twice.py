"""Two pods of one task at once, as after a lost node comes back, leave one complete result, whichever is first."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpmv_finetune.outputs import FILES_MARK
from tests.faults.step_commands import STEP_SECONDS, STEPS, read_result, step_command

STEPS_TESTED = ["validate-data", "preprocess", "merge"]


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step == "preprocess" else pytest.mark.faults_only) for step in STEPS_TESTED]
)
def test_two_processes_at_once_leave_one_complete_result(
    step: str, inputs_of: Callable[[str], Path], tmp_path: Path
) -> None:
    result = STEPS[step].result
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    inputs, together = inputs_of(step), tmp_path / "together"
    command = step_command(step, inputs, together)
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=STEP_SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert read_result(together / result) == read_result(inputs / result)
    assert {path.name for path in together.iterdir() if path.name.startswith(".")} <= {FILES_MARK}
