"""One MLflow run per pipeline run and a nested run per step; a retry finds its run again instead of a second one.

Runs are found by tags: the pipeline run's id (`KFP_RUN_ID` in the environment, set by the pipeline) and the task's
name. The pipeline's run carries the headline: the score, the loss and the settings that runs are compared by. Where
Kubeflow's own MLflow plugin has opened a run (`MLFLOW_RUN_ID`), the steps nest under that one; they give it metrics
but no parameters, because the launcher logs its own parameters there, and a clash of names loses a whole batch.

Tracking never makes a step fail and never delays it: a thread sends the metrics. After a failed call nothing is sent
for ten times as long as the call took; metrics are kept and sent when the server is back. Metrics that the server
refuses, for example because somebody deleted the run, are kept in `unsent` for the caller to save. The first failure
is reported at the end of the step. Without `MLFLOW_TRACKING_URI` nothing is tracked.

MLflow alone takes longer than all that a step does which finds everything finished. So it is imported as where
`mlflow-skinny` is installed without pandas, and no garbage is collected meanwhile, nor when the process ends: there is
hardly any, and each search for it visits every object of these libraries. Such a step takes 1.8 s of processor time
with a database of SQLite instead of 3.4 s, and 1.2 s with a server instead of 2.1 s.
"""

import atexit
import gc
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, without_password
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.kubernetes_terms import service_of
from minicpmv_finetune.run_records import Outcome, Result, write_outcome
from minicpmv_finetune.terminal import print_sentence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

INCOMPLETE = "MLflow tracking is incomplete"  # how the sentence about a failure begins
_PIPELINE_TAG = "minicpmv.pipeline_run"
_TASK_TAG = "minicpmv.task"
_OUTCOME_TAG = "minicpmv.outcome"
_RESULT_TAG = "minicpmv.result"
_ERROR_TAG = "minicpmv.error"
_FAULT_TAG = "minicpmv.fault"  # with the number of the attempt
_DESCRIPTION_TAG = "mlflow.note.content"  # MLflow's page of a run begins with it
_COMMIT_TAG = "mlflow.source.git.commit"  # MLflow's page shows it as the version of the source
_HOW_TO_LINK = f"for links, set `mlflow.ui_endpoint` in the profile, or {environment.MLFLOW_UI} when you submit"
_MAX_PARAMETER_LENGTH = 6000  # MLflow's own limit for a parameter's value
_MAX_BATCH = 1000  # MLflow's own limit for metrics in one call
_SQLITE = "sqlite:///"
_MLFLOW_SETTINGS = {
    # With MLflow's own settings each call to a server that is down would delay a step for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class StepRun:
    """The MLflow run of one step; no call raises an error, whatever the server does."""

    def __init__(
        self,
        client: "MlflowClient | None" = None,
        run_id: str | None = None,
        failure: str = "",
        parent: str | None = None,
    ) -> None:
        self._client = client
        self._parent = parent
        self.run_id = run_id
        self.failure = failure
        self._waiting: list[Metric] = []
        self._refused: list[Metric] = []
        self._silent_until = 0.0
        self._sender = ThreadPoolExecutor(1, "mlflow")
        self._sending: Future[None] | None = None

    @property
    def unsent(self) -> "list[Metric]":
        """Metrics that the server has not accepted."""
        return self._refused + self._waiting

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record settings; a retried step logs the same ones again, which MLflow accepts."""
        if self._client is None:
            return
        from mlflow.entities import Param

        batch = [Param(name, str(value)[:_MAX_PARAMETER_LENGTH]) for name, value in parameters.items()]
        for start in range(0, len(batch), 100):
            self._send("log_batch", params=batch[start : start + 100])

    def log_headline(self, metrics: Mapping[str, float], parameters: Mapping[str, Any] | None = None) -> None:
        """Record in the pipeline's run what runs are compared by; a step outside a pipeline has none."""
        if self._client is None or self._parent is None:
            return
        for name, value in metrics.items():
            if math.isfinite(value):
                self._send("log_metric", self._parent, key=name, value=float(value))
        if self._parent != environment.PLUGIN_RUN_ID.read():
            for name, value in (parameters or {}).items():
                self._send("log_param", self._parent, key=name, value=str(value)[:_MAX_PARAMETER_LENGTH])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record metrics of a training step."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        if self._sending is None or self._sending.done():
            # Where the run is finished, or Python ends, no thread starts, and the metrics stay in `unsent`.
            with suppress(RuntimeError):
                self._sending = self._sender.submit(self._send_metrics)

    def last_step(self, metric: str) -> int:
        """The last step for which the run has the metric; -1 when there is none."""
        if self._client is None or self.run_id is None:
            return -1
        try:
            return max((point.step for point in self._client.get_metric_history(self.run_id, metric)), default=-1)
        except Exception as error:
            self.failure = self.failure or _describe(error)
            return -1

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, by which a run can be found later, such as the number of the registered version."""
        for name, value in tags.items():
            self._send("set_tag", key=name, value=value)

    def log_file(self, path: str, folder: str | None = None) -> None:
        """Attach a small file, such as a report."""
        self._send("log_artifact", local_path=path, artifact_path=folder)

    def log_report(self, path: Path, name: str) -> None:
        """Attach a report, if it was written, under a name by whose suffix MLflow displays it."""
        if self._client is None or not path.is_file():
            return
        try:
            with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
                self.log_file(str(shutil.copyfile(path, Path(folder) / name)))
        except OSError as error:
            self.failure = self.failure or _describe(error)

    def finish(self, status: str) -> None:
        """Close the run, and report the first failure if there was one."""
        self._sender.shutdown()
        self._silent_until = 0.0
        self._send_metrics()
        self._send("set_terminated", status=status)
        self.report_failure()

    def report_failure(self) -> None:
        """Print the first failure, if there was one, once."""
        if self.failure:
            print_sentence(f"{INCOMPLETE}: {self.failure}")
            self.failure = ""

    def _send_metrics(self) -> None:
        """Send the waiting metrics, oldest first; those that a server that is down did not accept are kept."""
        while batch := self._waiting[:_MAX_BATCH]:
            failure = self._send("log_batch", metrics=batch)
            if failure is not None and not _is_refusal(failure):
                return
            if failure is not None:
                self._refused += batch
            del self._waiting[: len(batch)]

    def _send(self, call: str, run_id: str | None = None, **arguments: Any) -> Exception | None:
        """Call MLflow's client for this run or another; returns the error if the call failed."""
        started = time.monotonic()
        if self._client is None or started < self._silent_until:
            return ConnectionError("not sent")
        try:
            getattr(self._client, call)(run_id or self.run_id, **arguments)
            return None
        except Exception as error:
            # Whatever the error is, the step continues; its end reports the failure.
            self.failure = self.failure or _describe(error)
            if not _is_refusal(error):
                failed = time.monotonic()
                self._silent_until = failed + 10 * (failed - started)
            return error


@contextmanager
def step_run(task: str) -> Iterator[StepRun]:
    """The run of one step, open while the block runs and closed with its outcome.

    Args:
        task: Name of the step; with the pipeline run's id it identifies the run on a retry.
    """
    run = open_step_run(task)
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def open_step_run(task: str, reopen: bool = True) -> StepRun:
    """Find or create a step's run below its pipeline's run.

    Args:
        task: Name of the step.
        reopen: Whether the pipeline's run, if it has ended, is running again, as after a person's retry.
    """
    if not environment.TRACKING_URI.read():
        return StepRun()
    try:
        client = mlflow_client()
        pipeline_run = environment.PIPELINE_RUN_ID.read()
        tags = {_TASK_TAG: task, "mlflow.runName": task, **_commit_tags()}
        parent = None
        if plugin_run := environment.PLUGIN_RUN_ID.read():
            experiment = client.get_run(plugin_run).info.experiment_id
            parent = plugin_run
        else:
            experiment = _experiment(client)
            if pipeline_run:
                parent = _pipeline_run(client, experiment, pipeline_run, reopen)
        if parent:
            tags["mlflow.parentRunId"] = parent
        if pipeline_run:
            tags[_PIPELINE_TAG] = pipeline_run
            if found := _find(client, experiment, pipeline_run, task):
                client.update_run(found.info.run_id, status="RUNNING")
                return StepRun(client, found.info.run_id, parent=parent)
        return StepRun(client, client.create_run(experiment, tags=tags).info.run_id, parent=parent)
    except Exception as error:
        return StepRun(failure=_describe(error))


def link_to_run(task: str = "") -> str:
    """A line of Markdown that leads to a step's run, or the whole run's; empty where no server tracks the latter."""
    server, pipeline_run = environment.TRACKING_URI.read(), environment.PIPELINE_RUN_ID.read()
    if not server.startswith("http") or not pipeline_run:
        return ""
    try:
        client = mlflow_client()
        plugin_run = environment.PLUGIN_RUN_ID.read()
        experiment = client.get_run(plugin_run).info.experiment_id if plugin_run else _experiment(client)
        found = _find(client, experiment, pipeline_run, task or "pipeline")
    except Exception:
        return ""  # the end of the step has reported that the server does not answer
    if not found:
        return ""
    what = "step" if task else "run"
    if address := browser_address():
        return f"\n[This {what} in MLflow]({address}/#/experiments/{experiment}/runs/{found.info.run_id})\n"
    return f"\nThis {what} in MLflow: run `{found.info.run_id}` ({_HOW_TO_LINK})\n"


def browser_address() -> str:
    """Where people open the MLflow server; empty where only pods can reach it and nothing names another address."""
    named, server = environment.MLFLOW_UI.read(), environment.TRACKING_URI.read()
    if not named and environment.KUBERNETES_HOST.read() and service_of(server):
        return ""
    return without_password(named or server).rstrip("/")


def note_fault(task: str, attempt: int, sentence: str) -> None:
    """Note in a step's run a fault after which the step tries again; only in a pipeline run, where it is found."""
    _note_on_step(task, {f"{_FAULT_TAG}.{attempt}": sentence})


def note_failure(task: str, sentence: str) -> None:
    """Note why a step failed, in its run and, unless that has ended, in the pipeline's run."""
    _note_on_step(task, {_ERROR_TAG: sentence, _DESCRIPTION_TAG: sentence})
    _on_pipeline_run(lambda run: _note_end(run, "failed", f"failed in {task}: {sentence}"), unless_ended=True)


def note_outcome(result: Result, sentence: str) -> None:
    """Store what the pipeline run came to: in tags of its MLflow run, also where Kubeflow opened it, and in the store.

    `read_outcome` finds it again.
    """
    write_outcome(result, sentence)
    _on_pipeline_run(lambda run: _note_end(run, result, sentence))


def read_outcome() -> Outcome | None:
    """The last outcome noted in the pipeline's run; None when there is none, or when MLflow cannot be read."""
    try:
        found = _open_pipeline_run()
        tags = found[0].get_run(found[1]).data.tags if found else {}
        return Outcome.model_validate({"result": tags[_RESULT_TAG], "sentence": tags[_OUTCOME_TAG]})
    except Exception:
        return None


def end_pipeline_run(status: str, result: str, sentence: str) -> None:
    """Close the run that holds a pipeline run's steps, and let its page say how it ended."""
    _on_pipeline_run(lambda run: _note_end(run, result, sentence))
    finish_pipeline_run(status)


def _note_end(run: StepRun, result: str, sentence: str) -> None:
    run.log_tags({_RESULT_TAG: result, _OUTCOME_TAG: sentence, _DESCRIPTION_TAG: sentence})


def _note_on_step(task: str, tags: Mapping[str, str]) -> None:
    if environment.PIPELINE_RUN_ID.read():
        run = open_step_run(task, reopen=False)
        run.log_tags(tags)
        run.finish("FAILED")


def finish_pipeline_run(status: str) -> None:
    """Close the run that holds a pipeline run's steps, unless Kubeflow's plugin opened it, which also closes it.

    The run of a step that was killed is still open, and is closed too.
    """
    if not environment.PLUGIN_RUN_ID.read():
        _on_pipeline_run(lambda run: _finish_with_steps(run, status))


def end_abandoned_runs(statuses: Mapping[str, str]) -> None:
    """End what is still running in MLflow of pipeline runs that are over, for example because somebody cancelled them.

    Such a run has no last step that would do it. A run that Kubeflow's plugin has opened is left to the plugin.

    Args:
        statuses: How a pipeline run ended, in MLflow's words (FINISHED, FAILED, KILLED), by its id.

    Raises:
        RetryableError: MLflow refuses, or does not answer.
    """
    try:
        client = mlflow_client()
        experiments = [found.experiment_id for found in client.search_experiments()]
        query = f"tags.`{_PIPELINE_TAG}` LIKE '%' and attributes.status = 'RUNNING'"
        token = None
        abandoned: list[Run] = []
        while experiments:
            page = client.search_runs(experiments, query, page_token=token)
            abandoned += [run for run in page if run.data.tags[_PIPELINE_TAG] in statuses]
            token = page.token
            if not token:
                break
        for run in abandoned:
            status = statuses[run.data.tags[_PIPELINE_TAG]]
            if run.data.tags.get(_TASK_TAG) != "pipeline":
                # Nobody is there who would end a step's run; a run that is over has no step that works.
                client.set_terminated(run.info.run_id, status="KILLED")
                continue
            if status == "KILLED":
                _note_end(StepRun(client, run.info.run_id), "cancelled", "cancelled")
            client.set_terminated(run.info.run_id, status=status)
    except Exception as error:
        raise RetryableError(f"{without_password(environment.TRACKING_URI.read())}: {_describe(error)}") from error


def _on_pipeline_run(act: Callable[[StepRun], None], unless_ended: bool = False) -> None:
    try:
        found = _open_pipeline_run()
        if found and unless_ended and found[0].get_run(found[1]).info.status != "RUNNING":
            return
        run = StepRun(*found) if found else None
    except Exception as error:
        run = StepRun(failure=_describe(error))
    if run is not None:
        act(run)
        run.report_failure()


def _finish_with_steps(run: StepRun, status: str) -> None:
    try:
        client = mlflow_client()
        query = f"tags.`{_PIPELINE_TAG}` = '{environment.PIPELINE_RUN_ID.read()}' and attributes.status = 'RUNNING'"
        for found in client.search_runs([_experiment(client)], filter_string=query):
            if found.info.run_id != run.run_id:
                client.set_terminated(found.info.run_id, status="KILLED")
    except Exception as error:
        run.failure = run.failure or _describe(error)
    run.finish(status)


def _open_pipeline_run() -> "tuple[MlflowClient, str] | None":
    """The run that holds a pipeline run's steps; None where nothing is tracked or outside a pipeline run."""
    pipeline_run, plugin_run = environment.PIPELINE_RUN_ID.read(), environment.PLUGIN_RUN_ID.read()
    if not environment.TRACKING_URI.read() or not (pipeline_run or plugin_run):
        return None
    client = mlflow_client()
    return client, plugin_run or _pipeline_run(client, _experiment(client), str(pipeline_run))


def mlflow_client() -> "MlflowClient":
    """A client for `MLFLOW_TRACKING_URI` that gives up on a server that is down within seconds."""
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    uri = environment.TRACKING_URI.read()
    import_mlflow(with_database=uri.startswith(_SQLITE))
    from mlflow import MlflowClient

    # A new SQLite file is migrated through every schema version, and each migration would be logged.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith(_SQLITE):
        _create_database(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient()


def import_mlflow(with_database: bool) -> None:
    """Import MLflow without pandas, which nothing needs that is tracked here; what else needs it imports it later.

    Args:
        with_database: Whether the libraries for a database are imported too.
    """
    name = "mlflow.store.tracking.sqlalchemy_store" if with_database else "mlflow"
    modules: dict[str, Any] = sys.modules
    if name in modules:
        return
    is_first, is_left_out, collects = "mlflow" not in modules, "pandas" not in modules, gc.isenabled()
    gc.disable()
    if is_left_out:
        modules["pandas"] = None
    try:
        import_module(name)
    except ImportError:
        if not is_left_out:
            raise
        # This release of MLflow needs pandas after all. What was imported of it is incomplete, and goes.
        is_left_out = False
        for module in [found for found in modules if found == "pandas" or found.partition(".")[0] == "mlflow"]:
            del modules[module]
        import_module(name)
    finally:
        if is_left_out:
            del modules["pandas"]
        if collects:
            gc.enable()
    if is_first:
        _leave_out_of_collections()
        atexit.register(_leave_out_of_collections)


def _leave_out_of_collections() -> None:
    """Let no search for garbage visit what there is now, except beside torch: garbage may hold tensors then."""
    if "torch" not in sys.modules:
        gc.freeze()


def _create_database(path: Path) -> None:
    """Create MLflow's tables in a file of another name: no run could use a database with only some of the tables."""
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
            pass  # another step created it first
        except OSError:
            staging.replace(path)  # the file system has no hard links
    finally:
        staging.unlink(missing_ok=True)


def _experiment(client: "MlflowClient") -> str:
    name = environment.EXPERIMENT.read()
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    uri = environment.TRACKING_URI.read()
    # By default MLflow would store the artifacts of a database file in a folder below the working directory.
    folder = Path(uri.removeprefix(_SQLITE)).absolute().with_name("mlflow-artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=folder if uri.startswith(_SQLITE) else None))
    except Exception:
        # Another step may have created it first.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _pipeline_run(client: "MlflowClient", experiment: str, pipeline_run: str, reopen: bool = False) -> str:
    """The run of the whole pipeline run, created by the first step that needs it."""
    if found := _find(client, experiment, pipeline_run, "pipeline"):
        if reopen and found.info.status != "RUNNING":
            client.update_run(found.info.run_id, status="RUNNING")
        return str(found.info.run_id)
    tags = {_PIPELINE_TAG: pipeline_run, _TASK_TAG: "pipeline", "mlflow.runName": pipeline_run, **_commit_tags()}
    return str(client.create_run(experiment, tags=tags).info.run_id)


def _commit_tags() -> dict[str, str]:
    commit = git_commit()
    return {} if commit == environment.GIT_COMMIT.default else {_COMMIT_TAG: commit}


def _find(client: "MlflowClient", experiment: str, pipeline_run: str, task: str) -> "Run | None":
    query = f"tags.`{_PIPELINE_TAG}` = '{pipeline_run}' and tags.`{_TASK_TAG}` = '{task}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    return runs[0] if runs else None


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered, and would give the same answer to a retry."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= int(status) < 500 and status not in {408, 429}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(without_password(str(error)).strip() or 'no message').splitlines()[0]:.200}"
