"""Run a pipeline on this machine by kfp.local, in this environment or in containers; without a cluster."""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kfp import local

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.permanent_errors import MARKER_NAME
from minicpmv_finetune.tracking import step_runs
from minicpmv_finetune.tracking.registry import champion_of

from .finetuning import FINETUNE
from .pipeline import Pipeline
from .run_display import RunDisplay

Runner = Literal["subprocess", "docker"]


@dataclass(frozen=True)
class LocalRun:
    """A finished run.

    Attributes:
        folder: Folder that contains one folder per step with its outputs.
        seconds: Duration of each step.
    """

    folder: Path
    seconds: Mapping[str, float]

    def output(self, step: str, name: str) -> Path:
        """The path of a step's output."""
        return self.folder / step / name

    def metrics(self, step: str) -> dict[str, float]:
        """The values that a step logged to its Metrics artifact."""
        document = json.loads((self.folder / step / "executor_output.json").read_text())
        return dict(document["artifacts"]["metrics"]["artifacts"][0]["metadata"])


def run_pipeline(
    out: Path, inputs: Mapping[str, Any], runner: Runner = "subprocess", pipeline: Pipeline = FINETUNE
) -> LocalRun:
    """Run a whole pipeline on this machine.

    Args:
        out: Folder that receives `artifacts/`, `run.log`, the links `report.html` and `model` to the newest results,
            and, unless `MLFLOW_TRACKING_URI` is set, `mlflow.db`.
        inputs: Inputs of the pipeline by name.
        runner: `subprocess` runs the steps in this environment, `docker` in the steps' container images.
        pipeline: Pipeline to run.

    Raises:
        RetryableError: The model registry does not answer, and nothing was started; or a step met a temporary fault.
        UserError: A step found a mistake that only the user can fix.
        SystemExit: A step ended with a bug; its traceback is in `run.log`.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = f"{pipeline.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    variables = {
        environment.TRACKING_URI.name: environment.TRACKING_URI.read() or f"sqlite:///{out.absolute()}/mlflow.db",
        environment.PIPELINE_RUN_ID.name: name,
        environment.PROGRESS_SECONDS.name: "0.5",
    }
    artifacts = out / "artifacts"
    earlier = set(artifacts.glob("*"))
    with _environment(variables):
        # Unlike a database file, a server may be down.
        if variables[environment.TRACKING_URI.name].startswith("http"):
            champion_of(inputs.get("registered_model", ""))
    with (out / "run.log").open("w") as log, _environment(variables), RunDisplay(log) as display:
        local.init(_kfp_runner(runner, variables, out.absolute()), pipeline_root=str(artifacts))
        status = "FAILED"
        try:
            # Subprocesses do not use the container images, so a name that does not mention Python is no problem.
            with warnings.catch_warnings(), contextlib.redirect_stdout(display.stream):
                warnings.filterwarnings("ignore", message="You may be attemping to run a task")
                pipeline.build()(**inputs)
            status = "FINISHED"
        except (RuntimeError, ValueError) as error:
            # A failed container may have disappeared before kfp.local reads its exit code. kfp.local then counts it as
            # a success, and the next step finds no inputs, which is a ValueError.
            if isinstance(error, ValueError) and not display.error:
                raise
            raise _explain_failure(error, display, artifacts, earlier, out / "run.log") from None
        finally:
            step_runs.finish_pipeline_run(status)
    (folder,) = set(artifacts.glob("*")) - earlier
    run = LocalRun(folder, display.seconds)
    _link(out / "report.html", run.output("evaluate", "report"))
    _link(out / "model", run.output("merge", "model"))
    return run


def _explain_failure(
    error: Exception, display: RunDisplay, artifacts: Path, earlier: Set[Path], log: Path
) -> UserError | RetryableError | SystemExit:
    """The error of a failed run: the step's own message, or a reference to the log after a crash."""
    for marker in artifacts.glob(f"*/*/{MARKER_NAME}"):
        if marker.parent.parent not in earlier:
            return UserError(display.error or str(error))
    if display.error and not display.crashed:
        return RetryableError(display.error)
    print(f"error: {display.step} failed; its traceback is in {log}", file=sys.stderr)
    return SystemExit(1)


def _link(link: Path, target: Path) -> None:
    """Make a link lead to the newest result; at every moment it leads to the old or the new one."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    temporary.replace(link)


def _kfp_runner(runner: Runner, variables: Mapping[str, str], out: Path) -> local.SubprocessRunner | local.DockerRunner:
    if runner == "subprocess":
        return local.SubprocessRunner(use_venv=False)
    from docker.types import Mount

    from minicpmv_finetune.shards.format import CACHE_NAME

    passed = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    # A container sees only the pipeline root of this machine's files; the shard cache for later runs is beside it.
    cache = out / CACHE_NAME
    cache.mkdir(exist_ok=True)
    mounts = [Mount(str(cache), str(cache), "bind")]
    return local.DockerRunner(environment={**passed, **variables}, network_mode="host", mounts=mounts)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a block, and restore the whole environment afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
