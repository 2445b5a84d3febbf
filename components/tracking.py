"""One MLflow run per pipeline run and a nested run per step, found again on retry, never doubled.

Runs are found by tags: the pipeline run's id (`KFP_RUN_ID` in the environment, set by the pipeline) and the task's
name. Where Kubeflow's own MLflow plugin has opened a run (`MLFLOW_RUN_ID`), the steps nest under that one; they
never write into it, because the launcher logs its own parameters there and a clash of names loses a whole batch.

Tracking never fails the work: the first failure is kept and told at the end of the step. Without
`MLFLOW_TRACKING_URI` nothing is tracked.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
RUN_ID_VARIABLE = "KFP_RUN_ID"
KFP_PLUGIN_RUN_VARIABLE = "MLFLOW_RUN_ID"
DEFAULT_EXPERIMENT = "minicpmv-finetune"
_PIPELINE_TAG = "minicpmv.pipeline_run"
_TASK_TAG = "minicpmv.task"
_MAX_PARAMETER_LENGTH = 6000  # MLflow's own limit for a parameter's value


class StepRun:
    """The MLflow run of one step; every call is safe, whatever the server does."""

    def __init__(self, client: "MlflowClient | None", run_id: str | None) -> None:
        self._client = client
        self.run_id = run_id
        self.failure: str | None = None

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record settings; a retried step logs the same ones again, which MLflow accepts."""
        from mlflow.entities import Param

        batch = [Param(name, str(value)[:_MAX_PARAMETER_LENGTH]) for name, value in parameters.items()]
        for start in range(0, len(batch), 100):
            self._send("log_batch", params=batch[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record figures at a training step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._send("log_batch", metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record what a run is searched by."""
        from mlflow.entities import RunTag

        self._send("log_batch", tags=[RunTag(name, value) for name, value in tags.items()])

    def log_file(self, path: str, folder: str | None = None) -> None:
        """Attach a small file, such as a report."""
        self._send("log_artifact", local_path=path, artifact_path=folder)

    def finish(self, status: str) -> None:
        """Close the run, and tell of the first failure if there was one."""
        self._send("set_terminated", status=status)
        if self.failure:
            print(f"MLflow tracking is incomplete: {self.failure}", file=sys.stderr)

    def _send(self, call: str, **arguments: Any) -> None:
        if self._client is None or self.run_id is None:
            return
        try:
            getattr(self._client, call)(self.run_id, **arguments)
        except Exception as error:
            # Whatever it is, training goes on; the step's end says what is missing.
            self.failure = self.failure or f"{type(error).__name__} in {call}: {_first_line(error)}"


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
        return StepRun(None, None)
    _quiet()
    from mlflow import MlflowClient

    unreachable = StepRun(None, None)
    try:
        client = MlflowClient()
        experiment = _experiment(client)
        pipeline_run = os.environ.get(RUN_ID_VARIABLE)
        tags = {_TASK_TAG: task, "mlflow.runName": task}
        if parent := os.environ.get(KFP_PLUGIN_RUN_VARIABLE) or _parent(client, experiment, pipeline_run):
            tags["mlflow.parentRunId"] = parent
        if pipeline_run:
            tags[_PIPELINE_TAG] = pipeline_run
            if found := _find(client, experiment, pipeline_run, task):
                client.update_run(found, status="RUNNING")
                return StepRun(client, found)
        return StepRun(client, client.create_run(experiment, tags=tags).info.run_id)
    except Exception as error:
        unreachable.failure = f"{type(error).__name__}: {_first_line(error)}"
        return unreachable


def finish_pipeline_run(status: str) -> None:
    """Close the run that holds a pipeline run's steps."""
    pipeline_run = os.environ.get(RUN_ID_VARIABLE)
    if not os.environ.get(TRACKING_VARIABLE) or not pipeline_run:
        return
    _quiet()
    from mlflow import MlflowClient

    client = MlflowClient()
    StepRun(client, _parent(client, _experiment(client), pipeline_run)).finish(status)


def _experiment(client: "MlflowClient") -> str:
    name = os.environ.get(EXPERIMENT_VARIABLE, DEFAULT_EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _parent(client: "MlflowClient", experiment: str, pipeline_run: str | None) -> str | None:
    """The run of the whole pipeline run, created by whichever step comes first."""
    if not pipeline_run:
        return None
    if found := _find(client, experiment, pipeline_run, "pipeline"):
        return found
    tags = {_PIPELINE_TAG: pipeline_run, _TASK_TAG: "pipeline", "mlflow.runName": pipeline_run}
    return str(client.create_run(experiment, tags=tags).info.run_id)


def _find(client: "MlflowClient", experiment: str, pipeline_run: str, task: str) -> str | None:
    query = f"tags.`{_PIPELINE_TAG}` = '{pipeline_run}' and tags.`{_TASK_TAG}` = '{task}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _quiet() -> None:
    """A new sqlite file is migrated through every schema version, and each is announced."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
