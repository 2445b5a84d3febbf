"""Run the pipeline here, by kfp.local: in this environment, or in containers; no cluster.

kfp.local prints everything a step prints. A person wants to see one line a step: what runs, how far it is, and what
came out; so all of it goes to a log file, and `_Narrator` shows what matters.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from kfp import local
from rich.console import Console
from rich.live import Live
from rich.text import Text

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.permanent_errors import MARKER_NAME
from minicpmv_finetune.progress import OUTCOME_MARK
from minicpmv_finetune.tracking import step_runs
from minicpmv_finetune.tracking.registry import champion_of

from .finetuning import FINETUNE
from .pipeline import Pipeline

Runner = Literal["subprocess", "docker"]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '(?P<step>[\w-]+)'")
_ENDED = re.compile(r"Task '(?P<step>[\w-]+)' finished with status (?P<status>\w+)")
_PROGRESS = re.compile(r"^\w[\w ]*?\s+\d+% \|")


@dataclass(frozen=True)
class LocalRun:
    """A finished run.

    Attributes:
        folder: holds a folder a step with its outputs.
        seconds: duration of each step.
    """

    folder: Path
    seconds: Mapping[str, float]

    def output(self, step: str, name: str) -> Path:
        """Where a step's output lies."""
        return self.folder / step / name

    def metrics(self, step: str) -> dict[str, float]:
        """The figures a step logged to its Metrics artifact."""
        document = json.loads((self.folder / step / "executor_output.json").read_text())
        return dict(document["artifacts"]["metrics"]["artifacts"][0]["metadata"])


def run_pipeline(
    out: Path, inputs: Mapping[str, Any], runner: Runner = "subprocess", pipeline: Pipeline = FINETUNE
) -> LocalRun:
    """Run a whole pipeline on this machine.

    Args:
        out: receives `artifacts/`, `run.log`, the links `report.html` and `model` to the newest results, and, unless
            `MLFLOW_TRACKING_URI` is set, `mlflow.db`.
        inputs: of the pipeline, by name.
        runner: `subprocess` runs the steps in this environment, `docker` in the steps' images.
        pipeline: which one.

    Raises:
        RetryableError: the model registry does not answer, and nothing was begun; or a step met a fault that may be
            gone next time.
        UserError: a step found a mistake only the user can mend.
        SystemExit: a step ended with a bug; its traceback is in `run.log`.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    name = f"{pipeline.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
    variables = {
        environment.TRACKING_URI.name: environment.TRACKING_URI.read() or f"sqlite:///{out.absolute()}/mlflow.db",
        environment.PIPELINE_RUN_ID.name: name,
        environment.PROGRESS_SECONDS.name: "0.5",
    }
    artifacts = out / "artifacts"
    known = set(artifacts.glob("*"))
    with _environment(variables):
        # A server may be down; a database file is not.
        if variables[environment.TRACKING_URI.name].startswith("http"):
            champion_of(inputs.get("registered_model", ""))
    with (out / "run.log").open("w") as log, _environment(variables), _Narrator(log) as narrator:
        local.init(_kfp_runner(runner, variables, out.absolute()), pipeline_root=str(artifacts))
        status = "FAILED"
        try:
            # In subprocesses the images are not used, so it does not matter that their names say nothing of Python.
            with warnings.catch_warnings(), contextlib.redirect_stdout(narrator.stream):
                warnings.filterwarnings("ignore", message="You may be attemping to run a task")
                pipeline.build()(**inputs)
            status = "FINISHED"
        except (RuntimeError, ValueError) as error:
            # A container that has failed may be gone before kfp.local asks how it ended; that counts as a success, and
            # the next step then misses its outputs, which is a ValueError.
            if isinstance(error, ValueError) and not narrator.sentence:
                raise
            for marker in artifacts.glob(f"*/*/{MARKER_NAME}"):
                if marker.parent.parent not in known:
                    raise UserError(narrator.sentence or str(error)) from None
            if narrator.sentence and not narrator.crashed:
                raise RetryableError(narrator.sentence) from None
            print(f"error: {narrator.step} failed; its traceback is in {out / 'run.log'}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            step_runs.finish_pipeline_run(status)
    (folder,) = set(artifacts.glob("*")) - known
    run = LocalRun(folder, narrator.seconds)
    for link, target in {
        "report.html": run.output("evaluate", "report"),
        "model": run.output("merge", "model"),
    }.items():
        _point(out / link, target)
    return run


def _point(link: Path, target: Path) -> None:
    """Let a link name the newest result, at every moment either the old one or the new."""
    beside = link.with_name(f".{link.name}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target.relative_to(link.parent))
    beside.replace(link)


def _kfp_runner(runner: Runner, variables: Mapping[str, str], out: Path) -> local.SubprocessRunner | local.DockerRunner:
    if runner == "subprocess":
        return local.SubprocessRunner(use_venv=False)
    from docker.types import Mount

    from minicpmv_finetune.shards.format import CACHE_NAME

    passed = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    # Of this machine's files a container sees the pipeline root; shards are kept beside it, for later runs.
    cache = out / CACHE_NAME
    cache.mkdir(exist_ok=True)
    mounts = [Mount(str(cache), str(cache), "bind")]
    return local.DockerRunner(environment={**passed, **variables}, network_mode="host", mounts=mounts)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class _Narrator:
    """Shows a line a step, live, out of what kfp.local prints."""

    log: TextIO
    step: str = ""
    sentence: str = ""
    crashed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    stream: "_Lines" = field(init=False)
    _outcome: str = ""
    _progress: str = ""
    _started: float = 0.0

    def __post_init__(self) -> None:
        self.stream = _Lines(self._hear)
        # This very stream: what the steps print goes to another while they run.
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, redirect_stdout=False)

    def __enter__(self) -> "_Narrator":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def _hear(self, raw: str) -> None:
        line = _ANSI.sub("", raw).rstrip()
        self.log.write(f"{line}\n")
        self.log.flush()
        line = line.strip()
        if started := _STARTED.search(line):
            self.step, self._outcome, self._progress, self._started = started["step"], "", "", time.monotonic()
            self.sentence, self.crashed = "", False
        elif ended := _ENDED.search(line):
            self._end(ended["status"] == "SUCCESS")
        elif line.startswith(OUTCOME_MARK):
            self._outcome = line.removeprefix(OUTCOME_MARK)
        elif line.startswith("Traceback (most recent call last)"):
            self.crashed = True
        elif line.startswith("error: "):
            self.sentence = line.removeprefix("error: ")
        elif _PROGRESS.match(line):
            self._progress = line
        self._live.update(self._line("•", "cyan", self._progress or "starting …") if self.step else Text(""))

    def _end(self, succeeded: bool) -> None:
        took = time.monotonic() - self._started
        self.seconds[self.step] = round(took, 1)
        mark, colour = ("✓", "green") if succeeded else ("✗", "red")
        self._console.print(self._line(mark, colour, f"{self._outcome:<70} {took:5.0f} s"))
        self.step = "" if succeeded else self.step

    def _line(self, mark: str, colour: str, text: str) -> Text:
        return Text.assemble((f"  {mark} ", colour), (f"{self.step:<17}", "bold"), text)


class _Lines(io.TextIOBase):
    """A text stream that hands on whole lines."""

    def __init__(self, hear: Any) -> None:
        self.hear = hear
        self.pending = ""

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            if line.strip():
                self.hear(line)
        return len(text)
