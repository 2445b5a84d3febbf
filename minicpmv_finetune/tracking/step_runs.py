"""One MLflow run per pipeline run and a nested run per step, found again on retry, never doubled.

Runs are found by tags: the pipeline run's id (`KFP_RUN_ID` in the environment, set by the pipeline) and the task's
name. Where Kubeflow's own MLflow plugin has opened a run (`MLFLOW_RUN_ID`), the steps nest under that one; they
never write into it, because the launcher logs its own parameters there and a clash of names loses a whole batch.

Tracking never fails the work, and never holds it up: metrics are sent by a thread. After a call that failed nothing is
sent for ten times as long as it took; metrics are kept and sent when the server is back. What it refuses, as when
someone deleted the run, is kept for whoever opened the run to save. The first failure is told at the end of the step.
Without `MLFLOW_TRACKING_URI` nothing is tracked.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpmv_finetune import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

DEFAULT_EXPERIMENT = "minicpmv-finetune"
_PIPELINE_TAG = "minicpmv.pipeline_run"
_TASK_TAG = "minicpmv.task"
_OUTCOME_TAG = "minicpmv.outcome"
_MAX_PARAMETER_LENGTH = 6000  # MLflow's own limit for a parameter's value
_MAX_BATCH = 1000  # MLflow's own limit for metrics in one call
_SQLITE = "sqlite:///"
_MLFLOW_SETTINGS = {
    # MLflow's own would hold a step for minutes at each call to a server that is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class StepRun:
    """The MLflow run of one step; every call is safe, whatever the server does."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str | None = None, failure: str = "") -> None:
        self._client = client
        self.run_id = run_id
        self.failure = failure
        self._waiting: list[Metric] = []
        self._refused: list[Metric] = []
        self._silent_until = 0.0
        self._sender = ThreadPoolExecutor(1, "mlflow")
        self._sending: Future[None] | None = None

    @property
    def unsent(self) -> "list[Metric]":
        """Metrics that the server has not taken."""
        return self._refused + self._waiting

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record settings; a retried step logs the same ones again, which MLflow accepts."""
        if self._client is None:
            return
        from mlflow.entities import Param

        batch = [Param(name, str(value)[:_MAX_PARAMETER_LENGTH]) for name, value in parameters.items()]
        for start in range(0, len(batch), 100):
            self._send("log_batch", params=batch[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record figures at a training step."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if self._sending is None or self._sending.done():
            self._sending = self._sender.submit(self._send_metrics)

    def last_step(self, metric: str) -> int:
        """The last step of which the run knows the metric; -1 when it knows none."""
        if self._client is None or self.run_id is None:
            return -1
        try:
            return max((point.step for point in self._client.get_metric_history(self.run_id, metric)), default=-1)
        except Exception as error:
            self.failure = self.failure or _describe(error)
            return -1

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Note what is to be found again, such as which version came out."""
        for name, value in tags.items():
            self._send("set_tag", key=name, value=value)

    def log_file(self, path: str, folder: str | None = None) -> None:
        """Attach a small file, such as a report."""
        self._send("log_artifact", local_path=path, artifact_path=folder)

    def finish(self, status: str) -> None:
        """Close the run, and tell of the first failure if there was one."""
        self._sender.shutdown()
        self._silent_until = 0.0
        self._send_metrics()
        self._send("set_terminated", status=status)
        self.tell()

    def tell(self) -> None:
        """Tell of the first failure if there was one, once."""
        if self.failure:
            print(f"MLflow tracking is incomplete: {self.failure}", file=sys.stderr, flush=True)
            self.failure = ""

    def _send_metrics(self) -> None:
        """Send what has gathered, oldest first; what a server that is down did not take is kept for the next time."""
        while batch := self._waiting[:_MAX_BATCH]:
            failure = self._send("log_batch", metrics=batch)
            if failure is not None and not _is_refusal(failure):
                return
            if failure is not None:
                self._refused += batch
            del self._waiting[: len(batch)]

    def _send(self, call: str, **arguments: Any) -> Exception | None:
        """Call MLflow's client; returns why that failed."""
        started = time.monotonic()
        if self._client is None or started < self._silent_until:
            return ConnectionError("not asked")
        try:
            getattr(self._client, call)(self.run_id, **arguments)
            return None
        except Exception as error:
            # Whatever it is, the work goes on; the step's end says what is missing.
            self.failure = self.failure or _describe(error)
            if not _is_refusal(error):
                failed = time.monotonic()
                self._silent_until = failed + 10 * (failed - started)
            return error


@contextmanager
def step_run(task: str) -> Iterator[StepRun]:
    """The run of one step, open while the block runs and closed with its outcome.

    Args:
        task: the step's name; with the pipeline run's id it identifies the run on a retry.
    """
    run = open_step_run(task)
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def open_step_run(task: str) -> StepRun:
    """Find or create a step's run below its pipeline's run."""
    if not environment.TRACKING_URI.read():
        return StepRun()
    try:
        client = mlflow_client()
        pipeline_run = environment.PIPELINE_RUN_ID.read()
        tags = {_TASK_TAG: task, "mlflow.runName": task}
        if plugin_run := environment.PLUGIN_RUN_ID.read():
            experiment = client.get_run(plugin_run).info.experiment_id
            tags["mlflow.parentRunId"] = plugin_run
        else:
            experiment = _experiment(client)
            if pipeline_run:
                tags["mlflow.parentRunId"] = _pipeline_run(client, experiment, pipeline_run)
        if pipeline_run:
            tags[_PIPELINE_TAG] = pipeline_run
            if found := _find(client, experiment, pipeline_run, task):
                client.update_run(found, status="RUNNING")
                return StepRun(client, found)
        return StepRun(client, client.create_run(experiment, tags=tags).info.run_id)
    except Exception as error:
        return StepRun(failure=_describe(error))


def note_outcome(sentence: str) -> None:
    """Tell the pipeline's run what came out, for whoever reports on it; where Kubeflow opened that run, a tag too."""
    _on_pipeline_run(lambda run: run.log_tags({_OUTCOME_TAG: sentence}))


def read_outcome() -> str:
    """What the pipeline's run was told last; empty when nothing was, or nobody can say."""
    try:
        found = _open_pipeline_run()
        return str(found[0].get_run(found[1]).data.tags.get(_OUTCOME_TAG, "")) if found else ""
    except Exception:
        return ""


def finish_pipeline_run(status: str) -> None:
    """Close the run that holds a pipeline run's steps; where Kubeflow's plugin opened it, it also closes it."""
    if not environment.PLUGIN_RUN_ID.read():
        _on_pipeline_run(lambda run: run.finish(status))


def _on_pipeline_run(act: Callable[[StepRun], None]) -> None:
    try:
        found = _open_pipeline_run()
        run = StepRun(*found) if found else None
    except Exception as error:
        run = StepRun(failure=_describe(error))
    if run is not None:
        act(run)
        run.tell()


def _open_pipeline_run() -> "tuple[MlflowClient, str] | None":
    """The run that holds a pipeline run's steps; none where nothing is tracked or no pipeline runs."""
    pipeline_run, plugin_run = environment.PIPELINE_RUN_ID.read(), environment.PLUGIN_RUN_ID.read()
    if not environment.TRACKING_URI.read() or not (pipeline_run or plugin_run):
        return None
    client = mlflow_client()
    return client, plugin_run or _pipeline_run(client, _experiment(client), str(pipeline_run))


def mlflow_client() -> "MlflowClient":
    """A client for `MLFLOW_TRACKING_URI` that gives up on a server that is down within seconds."""
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # A new sqlite file is migrated through every schema version, and each is announced.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = environment.TRACKING_URI.read()
    if uri.startswith(_SQLITE):
        _make_database(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient()


def _make_database(path: Path) -> None:
    """Make MLflow's tables under another name: of a process killed meanwhile no run could use the half of them."""
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        MlflowClient(f"{_SQLITE}{staging}").search_experiments(max_results=1)
        try:
            path.hardlink_to(staging)
        except FileExistsError:
            pass  # another step was faster
        except OSError:
            staging.replace(path)  # no links on this file system
    finally:
        staging.unlink(missing_ok=True)


def _experiment(client: "MlflowClient") -> str:
    name = environment.EXPERIMENT.read()
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    uri = environment.TRACKING_URI.read()
    # With a database file alone MLflow would put files into a folder below the current one.
    beside = Path(uri.removeprefix(_SQLITE)).absolute().with_name("mlflow-artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=beside if uri.startswith(_SQLITE) else None))
    except Exception:
        # Another step may have been faster.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _pipeline_run(client: "MlflowClient", experiment: str, pipeline_run: str) -> str:
    """The run of the whole pipeline run, created by whichever step comes first."""
    if found := _find(client, experiment, pipeline_run, "pipeline"):
        return found
    tags = {_PIPELINE_TAG: pipeline_run, _TASK_TAG: "pipeline", "mlflow.runName": pipeline_run}
    return str(client.create_run(experiment, tags=tags).info.run_id)


def _find(client: "MlflowClient", experiment: str, pipeline_run: str, task: str) -> str | None:
    query = f"tags.`{_PIPELINE_TAG}` = '{pipeline_run}' and tags.`{_TASK_TAG}` = '{task}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered, and would answer the same another time."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= int(status) < 500 and status not in {408, 429}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(without_password(str(error)).strip() or 'no message').splitlines()[0]:.200}"


def without_password(text: str) -> str:
    """The text with addresses that hold no user and password: MLflow's messages quote the server's address whole."""
    return re.sub(r"//[^/\s]*@", "//", text)
