"""Two pods of one task at once, as when a node is lost from sight and comes back: one whole result, whoever wins."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.steps import STEPS, command_of, content

TOGETHER = ["validate-data", "preprocess", "merge"]


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step == "preprocess" else pytest.mark.faults_only) for step in TOGETHER]
)
def test_two_at_once_leave_one_whole_result(step: str, inputs: Path, tmp_path: Path) -> None:
    result = STEPS[step][1]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    alone = tmp_path / "alone"
    subprocess.run(command_of(step, inputs, alone), check=True, env=environment, capture_output=True)
    together = tmp_path / "together"
    environment["XDG_CACHE_HOME"] = str(tmp_path / "another-cache")
    command = command_of(step, inputs, together)
    twins = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [twin.communicate()[1] for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0], said
    assert content(together / result) == content(alone / result)
    assert [path.name for path in together.iterdir() if path.name.startswith(".")] == []
