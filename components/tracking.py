"""One MLflow run per pipeline run and a nested run per step, found again on retry, never doubled.

Runs are found by tags: the pipeline run's id (`KFP_RUN_ID` in the environment, set by the pipeline) and the task's
name. Where Kubeflow's own MLflow plugin has opened a run (`MLFLOW_RUN_ID`), the steps nest under that one; they
never write into it, because the launcher logs its own parameters there and a clash of names loses a whole batch.

Tracking never fails the work, and hardly slows it: after a call that failed nothing is sent for ten times as long as
it took, while metrics are kept and sent when the server is back. The first failure is told at the end of the step.
Without `MLFLOW_TRACKING_URI` nothing is tracked.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
RUN_ID_VARIABLE = "KFP_RUN_ID"
KFP_PLUGIN_RUN_VARIABLE = "MLFLOW_RUN_ID"
DEFAULT_EXPERIMENT = "minicpmv-finetune"
_PIPELINE_TAG = "minicpmv.pipeline_run"
_TASK_TAG = "minicpmv.task"
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
        self.unsent: list[Metric] = []
        self._silent_until = 0.0

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
        self.unsent += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._send_metrics()

    def last_step(self, metric: str) -> int:
        """The last step of which the run knows the metric; -1 when it knows none."""
        if self._client is None or self.run_id is None:
            return -1
        try:
            return max((point.step for point in self._client.get_metric_history(self.run_id, metric)), default=-1)
        except Exception as error:
            self.failure = self.failure or _describe(error)
            return -1

    def log_file(self, path: str, folder: str | None = None) -> None:
        """Attach a small file, such as a report."""
        self._send("log_artifact", local_path=path, artifact_path=folder)

    def finish(self, status: str) -> None:
        """Close the run, and tell of the first failure if there was one."""
        self._silent_until = 0.0
        self._send_metrics()
        self._send("set_terminated", status=status)
        if self.failure:
            print(f"MLflow tracking is incomplete: {self.failure}", file=sys.stderr, flush=True)

    def _send_metrics(self) -> None:
        """Send what has gathered, oldest first; what a server that is down did not take is kept for the next time."""
        while self.unsent and self._send("log_batch", metrics=self.unsent[:_MAX_BATCH]):
            del self.unsent[:_MAX_BATCH]

    def _send(self, call: str, **arguments: Any) -> bool:
        started = time.monotonic()
        if self._client is None or started < self._silent_until:
            return False
        try:
            getattr(self._client, call)(self.run_id, **arguments)
            return True
        except Exception as error:
            # Whatever it is, the work goes on; the step's end says what is missing.
            self.failure = self.failure or _describe(error)
            failed = time.monotonic()
            self._silent_until = failed + 10 * (failed - started)
            return False


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
    if not os.environ.get(TRACKING_VARIABLE):
        return StepRun()
    try:
        client = _client()
        pipeline_run = os.environ.get(RUN_ID_VARIABLE)
        tags = {_TASK_TAG: task, "mlflow.runName": task}
        if plugin_run := os.environ.get(KFP_PLUGIN_RUN_VARIABLE):
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


def finish_pipeline_run(status: str) -> None:
    """Close the run that holds a pipeline run's steps; where Kubeflow's plugin opened it, it also closes it."""
    pipeline_run = os.environ.get(RUN_ID_VARIABLE)
    if not os.environ.get(TRACKING_VARIABLE) or not pipeline_run or os.environ.get(KFP_PLUGIN_RUN_VARIABLE):
        return
    try:
        client = _client()
        run = StepRun(client, _pipeline_run(client, _experiment(client), pipeline_run))
    except Exception as error:
        run = StepRun(failure=_describe(error))
    run.finish(status)


def _client() -> "MlflowClient":
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # A new sqlite file is migrated through every schema version, and each is announced.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient()


def _experiment(client: "MlflowClient") -> str:
    name = os.environ.get(EXPERIMENT_VARIABLE, DEFAULT_EXPERIMENT)
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    uri = os.environ[TRACKING_VARIABLE]
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


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.200}"
