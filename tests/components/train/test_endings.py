"""Whatever ends a training, it has ended seconds later, with its sentence and exit code, and no process is left."""

import contextlib
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from _pytest.mark import ParameterSet

from minicpmv_finetune import environment
from tests.components.train.worker_with_fault import FAULT

SECONDS = 15
FLAGS = (
    "--use_lora true --tune_llm false --lora_r 4 --use_cpu true --per_device_train_batch_size 4 --max_steps 10000 "
    "--save_strategy steps --logging_steps 1"
)
START = (
    "from minicpmv_finetune.components.train import launch; "
    "launch.WORKER = 'tests.components.train.worker_with_fault'; "
    "from minicpmv_finetune.cli.main import main; main()"
)


class Ending(NamedTuple):
    """A fault, and what it must lead to.

    Attributes:
        code: Exit code.
        sentence: Beginning of the last line.
        disturb: What the test does to the command's process during the training; otherwise the training fails itself.
    """

    code: int
    sentence: str
    disturb: Callable[[psutil.Process], None] | None = None


def _last_rank(launcher: psutil.Process) -> psutil.Process:
    return max(launcher.children(), key=lambda process: int(process.environ()["RANK"]))


ENDINGS = {
    "full disk": Ending(75, "error: .*no space is left on the disk"),
    "step": Ending(1, "error: training process . ended with exit code 1."),
    "sample": Ending(2, "error: This sample is damaged; repair it."),
    "SIGTERM": Ending(75, "error: Training was stopped by SIGTERM after step", lambda launcher: launcher.terminate()),
    "SIGINT": Ending(
        130, "error: Training was stopped by Ctrl-C after step", lambda launcher: launcher.send_signal(signal.SIGINT)
    ),
    "killed worker": Ending(
        75, "error: A worker of the data loader was killed", lambda launcher: _last_rank(launcher).children()[0].kill()
    ),
    "killed process": Ending(
        137, r"error: training process . was killed \(signal 9\) in step", lambda launcher: _last_rank(launcher).kill()
    ),
}
IN_EVERY_RUN = {("sample", 2, 1)}  # of the others their sentences, in test_launch.py and test_errors.py


def _cases() -> list[ParameterSet]:
    """Each fault with each number of workers, and with one and two processes in turn."""
    cases = []
    for (number, fault), workers in itertools.product(enumerate(ENDINGS), (0, 1, 2)):
        case = (fault, workers, 1 + (number + workers) % 2)
        if case[:2] != ("killed worker", 0):
            marks = [] if case in IN_EVERY_RUN else [pytest.mark.faults_only]
            cases.append(pytest.param(*case, marks=marks, id=f"{case[0]}-{case[1]}-{case[2]}".replace(" ", "_")))
    return cases


@pytest.mark.parametrize(("fault", "workers", "processes"), _cases())
def test_a_training_ends_soon_whatever_ends_it(
    fault: str, workers: int, processes: int, tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    ending = ENDINGS[fault]
    paths = ["--model_name_or_path", str(tiny_46), "--data_path", str(shards), "--output_dir", str(tmp_path / "out")]
    saving = ["--save_steps", "3" if fault == "full disk" else "100000"]
    command = [sys.executable, "-c", START, "train", *paths, *FLAGS.split(), *saving]
    variables = {"TMPDIR": str(tmp_path), "PET_NPROC_PER_NODE": str(processes), "PET_MAX_RESTARTS": "0", FAULT: fault}

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores in what it starts in the background
        if fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500 * 1024,) * 2)

    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [*command, "--dataloader_num_workers", str(workers)],
            env={**os.environ, **variables, environment.PROGRESS_SECONDS.name: "0"},
            stderr=log,
            preexec_fn=prepare,
        ) as process,
    ):
        try:
            seconds, limit = _follow(psutil.Process(process.pid), tmp_path / "log", ending)
            code = process.wait(10)
            _, left = psutil.wait_procs(_processes_of(tmp_path), timeout=SECONDS)
        finally:
            for survivor in _processes_of(tmp_path):
                survivor.kill()
    lines = (tmp_path / "log").read_text().splitlines()
    assert code == ending.code, lines
    assert re.match(ending.sentence, lines[-1]), lines
    assert fault == "step" or "Traceback" not in "".join(lines), lines
    assert seconds < limit
    assert not left


def _follow(launcher: psutil.Process, log: Path, ending: Ending) -> tuple[float, float]:
    """Disturb a training in its third step.

    Returns:
        The seconds from the disturbance or the last progress to the end, and their limit: a busy machine may take as
        long for a step as it did before, the fault may be at the end of the step after the next, and it may take as
        long to end the processes as it took to start them.
    """
    last_step, progressed, disturb, starting, longest = 0, time.monotonic(), ending.disturb, 0.0, 0.0
    while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
        step = log.read_text().count("loss ")
        if step > last_step:
            passed = time.monotonic() - progressed
            starting, longest = (starting, max(longest, passed)) if last_step else (passed, longest)
            last_step, progressed = step, time.monotonic()
        if disturb and step >= 3:
            disturb(launcher)
            disturb, progressed = None, time.monotonic()
        if time.monotonic() - progressed > 240:
            raise AssertionError(log.read_text())
        time.sleep(0.05)
    return time.monotonic() - progressed, max(SECONDS, starting) + 2 * longest


def _processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of a training, by the folder for its temporary files."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found
