"""Run a pipeline on this machine by kfp.local, in this environment or in containers; without a cluster."""

import contextlib
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kfp import local

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.worker import needs_bitsandbytes, needs_deepspeed
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.fork_server import is_possible
from minicpmv_finetune.permanent_errors import MARKER_NAME
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.promotion_record import read_promotion_record
from minicpmv_finetune.tracking.registry import champion_of

from .finetuning import FINETUNE
from .local_steps import CONTAINER_LABEL, RunSteps
from .pipeline import Pipeline
from .run_display import RunDisplay
from .run_folder import LINKS, RunFolder, inputs_digest, locked, open_run, remove_unfinished, unfinished_runs
from .step_servers import StepServers

Runner = Literal["subprocess", "docker"]
_ALSO_AFTER_FAILURE = tuple(name for name in LINKS if name != "model")


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

    def scores(self) -> dict[str, float]:
        """All metrics of the evaluation, by name."""
        return read_promotion_record(self.output("evaluate", "promotion_record")).metrics


def run_pipeline(
    out: Path,
    inputs: Mapping[str, Any],
    runner: Runner = "subprocess",
    pipeline: Pipeline = FINETUNE,
    fresh: bool = False,
) -> LocalRun:
    """Run a whole pipeline on this machine, or go on with its last unfinished run of the same inputs.

    Args:
        out: Folder that receives `artifacts/`, `run.log`, links to the newest results and, unless
            `MLFLOW_TRACKING_URI` is set, `mlflow.db`.
        inputs: Inputs of the pipeline by name.
        runner: `subprocess` runs the steps in this environment, `docker` in the steps' container images.
        pipeline: Pipeline to run.
        fresh: Start over, and remove the unfinished runs of the same inputs.

    Returns:
        The finished run.

    Raises:
        RetryableError: The model registry does not answer, and nothing was started; or a step met a temporary fault.
        UserError: A step found a mistake that only the user can fix, or another run works in the folder.
        SystemExit: A step ended with a bug, and its traceback is in `run.log`; or a signal stopped the run.
    """
    artifacts = out / "artifacts"
    digest = inputs_digest(pipeline.name, inputs)
    given_address = environment.TRACKING_URI.read()
    tracking = given_address or f"sqlite:///{out.absolute()}/mlflow.db"
    if given_address:
        # A server may be down, and an address may be wrong.
        champion_of(inputs.get("registered_model", ""))
    with locked(artifacts) as lock:
        if fresh:
            remove_unfinished(artifacts, digest)
        folder = open_run(artifacts, pipeline.name, digest)
        variables = {
            environment.TRACKING_URI.name: tracking,
            environment.PIPELINE_RUN_ID.name: folder.path.name,
            # The steps say everything; the display decides what of it is shown.
            environment.PROGRESS_SECONDS.name: "0.5",
            environment.QUIET.name: "",
        }
        with (
            (out / "run.log").open("a", encoding="utf-8") as log,
            RunDisplay(log, pipeline.steps) as display,
            _environment(variables),
        ):
            _announce(display, folder)
            is_here = runner == "subprocess"
            expected = set(pipeline.steps) - set(folder.finished_steps())
            with StepServers(expected) if is_here and _may_fork(pipeline, inputs) else nullcontext() as servers:
                steps = RunSteps(folder, display, lock, not is_here, servers)
                kfp_runner = _kfp_runner(runner, variables, out.absolute(), folder.path.name)
                local.init(kfp_runner, pipeline_root=str(artifacts))
                _run_steps(steps, pipeline, inputs, out)
        folder.finish()
        remove_unfinished(artifacts, digest)
    _link_results(out, folder.path, LINKS)
    return LocalRun(folder.path, {**display.seconds, **steps.reused})


def _may_fork(pipeline: Pipeline, inputs: Mapping[str, Any]) -> bool:
    """Whether the steps may be forks of processes that import neither bitsandbytes nor DeepSpeed."""
    flags = {**(inputs.get("training_flags") or {}), "model_name_or_path": inputs.get("base_model_uri")}
    trains = "train" in pipeline.steps
    return trains and is_possible() and not needs_bitsandbytes(flags) and not needs_deepspeed(flags)


def _announce(display: RunDisplay, folder: RunFolder) -> None:
    """Say what the run begins with, on the terminal and in the log."""
    begun = f"{folder.path.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    display.log.write(f"==== {begun}{', going on' if folder.goes_on else ''}\n")
    if folder.goes_on:
        display.say(f"going on with the unfinished run {folder.path.name}; --fresh starts over")
    others = unfinished_runs(folder.path.parent, folder.inputs, others=True)
    if others:
        size = sum(file.lstat().st_size for other in others for file in other.rglob("*")) / 1e9
        names = ", ".join(other.name for other in others)
        display.say(f"unfinished runs of other inputs in {folder.path.parent} ({size:.1f} GB): {names}")


def _run_steps(steps: RunSteps, pipeline: Pipeline, inputs: Mapping[str, Any], out: Path) -> None:
    """Let kfp.local run the steps, and turn a failure into one of the two errors, or into the end of this process."""
    status = "FAILED"
    display = steps.display
    try:
        # Subprocesses do not use the container images, so a name that does not mention Python is no problem.
        with warnings.catch_warnings(), contextlib.redirect_stdout(display.stream), steps.in_charge():
            warnings.filterwarnings("ignore", message="You may be attemping to run a task")
            # Without a webhook nobody but the reader of this terminal would learn of it.
            pipeline.build(with_report=bool(environment.WEBHOOK_URL.read()))(**inputs)
        status = "FINISHED"
    except (RuntimeError, ValueError) as error:
        if steps.stopped_by:
            status = "KILLED"
            raise _stopped(steps) from None
        # A failed container may have disappeared before kfp.local reads its exit code. kfp.local then counts it as
        # a success, and the next step finds no inputs, which is a ValueError.
        if isinstance(error, ValueError) and not display.error:
            raise
        _announce_rest(steps, out)
        raise _explain_failure(error, display, steps.folder.path, out / "run.log") from None
    finally:
        steps.end_tracking(status)
        _link_results(out, steps.folder.path, _ALSO_AFTER_FAILURE)


def _announce_rest(steps: RunSteps, out: Path) -> None:
    """Say what a failed run leaves: reports of the failed step, and steps that need not be done again."""
    for name, result in LINKS.items():
        if result.startswith(f"{steps.display.step}/") and (steps.folder.path / result).is_file():
            steps.display.say(f"see {out / name}")
    if steps.folder.finished_steps():
        steps.display.say("the same command goes on with the finished steps; --fresh starts over")


def _stopped(steps: RunSteps) -> SystemExit:
    # A training says how far it came; what to do is the same for all steps.
    state = steps.error.partition(";")[0] or f"{steps.stopped_in or 'the run'} was stopped"
    steps.display.say(f"{state}; the same command goes on from there, and --fresh starts over")
    return SystemExit(128 + steps.stopped_by)


def _explain_failure(
    error: Exception, display: RunDisplay, folder: Path, log: Path
) -> UserError | RetryableError | SystemExit:
    """The error of a failed run: the step's own message, or a reference to the log after a crash."""
    if any(folder.glob(f"*/{MARKER_NAME}")):
        return UserError(display.error or str(error))
    if display.error and not display.crashed:
        return RetryableError(display.error)
    command = f"tail -n 40 {shlex.quote(str(log))}"
    print_sentence(f"error: {display.step} failed; its traceback is in {log}: type `{command}`")
    return SystemExit(1)


def _link_results(out: Path, folder: Path, names: Iterable[str]) -> None:
    """Make links lead to the results of a run; what the run did not write keeps its link."""
    for name in names:
        if (folder / LINKS[name]).exists():
            _link(out / name, _with_ending(folder / LINKS[name], Path(name).suffix))


def _with_ending(result: Path, ending: str) -> Path:
    """A result under a name with this ending, beside it.

    Kubeflow's artifacts have no ending, and a browser looks at the name of the file that a link leads to: it would show
    a page's source.
    """
    if result.is_dir() or result.suffix == ending:
        return result
    named = result.with_name(f"{result.name}{ending}")
    named.unlink(missing_ok=True)
    try:
        named.hardlink_to(result)
    except OSError:  # a file system without hard links
        shutil.copyfile(result, named)
    return named


def _link(link: Path, target: Path) -> None:
    """Make a link lead to the newest result; at every moment it leads to the old or the new one."""
    if os.path.lexists(link) and not link.is_symlink():
        print_sentence(f"warning: {link} was put there by something else while the run worked; see {target}")
        return
    with tempfile.TemporaryDirectory(prefix=f".{link.name}.", dir=link.parent) as folder:
        temporary = Path(folder) / "link"
        temporary.symlink_to(target.relative_to(link.parent))
        temporary.replace(link)


def _kfp_runner(
    runner: Runner, variables: Mapping[str, str], out: Path, name: str
) -> local.SubprocessRunner | local.DockerRunner:
    if runner == "subprocess":
        return local.SubprocessRunner(use_venv=False)
    from docker.types import Mount

    from minicpmv_finetune.shards.format import CACHE_NAME

    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("AWS_", "MLFLOW_", environment.WEBHOOK_URL.name))
    }
    # A container sees only the pipeline root of this machine's files; the shard cache for later runs is beside it.
    cache = out / CACHE_NAME
    cache.mkdir(exist_ok=True)
    mounts = [Mount(str(cache), str(cache), "bind")]
    labels = {CONTAINER_LABEL: name}
    return local.DockerRunner(environment={**passed, **variables}, network_mode="host", mounts=mounts, labels=labels)


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
