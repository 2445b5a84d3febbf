"""The clock jumps a day ahead and a week back while a step runs, as when a machine wakes up or NTP finds its server."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.step_commands import STEP_SECONDS, STEPS, read_result, step_command

# sitecustomize.py, which Python runs first in each process of the step. The system's clock itself is not changed.
JUMPING_CLOCK = """
import itertools
import time

_real, _jumps = time.time, itertools.cycle((0, 0, 0, 86_400, 86_400, -604_800, -604_800))
time.time = lambda: _real() + next(_jumps)
"""


@pytest.mark.parametrize(
    "step",
    ["preprocess", *(pytest.param(step, marks=pytest.mark.faults_only) for step in STEPS if step != "preprocess")],
)
def test_a_step_has_the_same_result(step: str, inputs_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    out = tmp_path / "out"
    done = subprocess.run(
        step_command(step, inputs_of(step), out), env=environment, capture_output=True, text=True, timeout=STEP_SECONDS
    )
    assert done.returncode == 0, done.stderr
    result = STEPS[step].result
    if step != "evaluate":
        assert read_result(out / result) == read_result(inputs_of(step) / result)
    if step == "train":
        figures = json.loads((out / result / "training.json").read_text())["metrics"]
        assert 0 < figures["seconds"] < 600
        assert figures["samples/s"] > 0
