"""The log of a step, from wherever it still is, and the sentence in it that says why the step failed.

In this order: the pod in Kubernetes, the API server (which reads the same pod, for callers without access to
Kubernetes), Argo's archive in the object store, and the copy that Kubeflow's launcher uploads. A stock Kubeflow deletes
the pods of a finished run after an hour; from then on only the last two have the log.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import dropwhile, takewhile
from typing import Any

import kfp_server_api

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.permanent_errors import MARKER_NAME, read_marker
from minicpmv_finetune.run_records import read_failed_steps

from .client import Cluster
from .pods import Namespace, NoAccessError
from .run_steps import StepRow, pod_name
from .store import pipeline_root, run_folder, use_store

# glog's lines: level, month and day, time, thread, file and line of Kubeflow's launcher.
_LAUNCHER = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] (.*)")
_ARGO = re.compile(r"time=\S+ level=(debug|info) .*\bargo=true\b|Error: exit status \d+$", re.IGNORECASE)
_EXECUTOR_NOTE = re.compile(r"\[KFP Executor [^\]]* INFO\]: ?(.*)")
_EXIT_STATUS = re.compile(r"exit status \d+$")
_LAUNCHER_FAILURE = re.compile(r"failed to execute component: (.*)")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)(: .*)?$")


class _NoLogError(Exception):
    """The log is not at this place; the message is the reason."""


def read_log(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """What the newest pod of a step has written so far.

    Raises:
        UserError: The step has not started, or no place has its log.
    """
    if not step.pod:
        shown = f"minicpmv-finetune runs {run.run_id}"
        raise UserError(f"{step.step}: has not started, so there is no log; `{shown}` shows why.")
    places: dict[str, Callable[[Cluster, kfp_server_api.V2beta1Run, StepRow], str]] = {
        "Kubernetes": _read_pod,
        "Kubeflow Pipelines": _read_server,
        "the archive": _read_archive,
        "executor-logs": _read_executor_logs,
    }
    reasons = []
    for place, read in places.items():
        try:
            return read(cluster, run, step)
        except (_NoLogError, NoAccessError, UserError, RetryableError) as error:
            reasons.append(f"{place}: {str(error).rstrip('.')}")
    raise UserError(f"{step.step}: its log is nowhere to be read ({'; '.join(reasons)}).")


def without_launcher(log: str) -> str:
    """A log without what Kubeflow's launcher and executor, and Argo, print around the step's own lines.

    Their warnings and errors stay, except for the repetitions of the step's exit code.
    """
    return "".join(f"{line}\n" for line in _own_lines(iter(log.splitlines())))


def last_error(log: str) -> str:
    """Why a step failed, by its log: its own sentence, else its exception, else what the launcher says; or empty."""
    lines = log.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        first, *rest = lines[errors[-1] :]
        mistakes = [line.removeprefix("- ") for line in takewhile(lambda line: line.startswith("- "), rest)]
        return " ".join([first.removeprefix("error: "), *mistakes])
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    if exceptions:
        return exceptions[-1]
    failures = [match[1] for match in map(_LAUNCHER_FAILURE.search, lines) if match]
    return next((failure for failure in reversed(failures) if not _EXIT_STATUS.match(failure)), "")


def stored_sentence(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """The sentence that a failed step left in the store, at the root of its run or beside its outputs; or empty."""
    with suppress(UserError, RetryableError, _NoLogError):
        use_store(cluster.profile)
        folder = run_folder(cluster.profile, run)
        sentences = {failed.step: failed.sentence for failed in read_failed_steps(folder)}
        # Earlier versions wrote no number, so that the sentence could be that of another part.
        if sentence := sentences.get(step.step) or sentences.get(step.name):
            return sentence
        return read_marker(_newest_file(_folder_of(folder, step), MARKER_NAME)) or ""
    return ""


def _own_lines(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if match := _LAUNCHER.match(line):
            if match[2].endswith(": {"):
                _skip_document(lines)
            if match[1] in "IW" or _EXIT_STATUS.search(match[2]):
                continue
        elif match := _EXECUTOR_NOTE.match(line):
            if match[1].startswith("Got executor_input"):
                _skip_document(lines)
            continue
        elif _ARGO.match(line):
            continue
        yield line


def _skip_document(lines: Iterator[str]) -> None:
    """Skip a JSON document, whose other lines are indented and whose end is a brace in the first column."""
    next(dropwhile(lambda part: part != "}", lines), None)


def _read_pod(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    namespace = Namespace(cluster.profile)
    for pod in namespace.pods(run.run_id):
        if pod.node == step.pod or pod.name == step.pod:
            if log := namespace.log(pod.name):
                return log
            raise _NoLogError("its container has written nothing yet")
    raise _NoLogError(f"the pod is gone from {namespace.name}")


def _read_server(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    # The generated services lack this call; Kubeflow's own UI uses it.
    api = cluster.client.runs.run_service_get_run.__self__.api_client
    names = [step.pod]
    with suppress(UserError, RetryableError):
        names.insert(0, pod_name(step.pod, _specification(cluster, run), step.name))
    reason = ""
    for name in dict.fromkeys(names):
        answer = cluster.call(
            api.call_api,
            "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log",
            "GET",
            {"run_id": run.run_id, "node_id": name},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
        )
        text = str(answer.data.decode(errors="replace"))
        reason = _error_of(text)
        if not reason:
            return text
    raise _NoLogError(reason)


def _error_of(answer: str) -> str:
    """The server's reason for having no log, which it answers with status 200."""
    if answer.startswith("{"):
        with suppress(ValueError):
            if message := json.loads(answer).get("error_message"):
                return f"has no log of this pod ({' '.join(str(message).split()):.120})"
    return ""


def _specification(cluster: Cluster, run: kfp_server_api.V2beta1Run) -> dict[str, Any]:
    """The run's pipeline: its own, or that of its version."""
    reference = run.pipeline_version_reference
    if run.pipeline_spec or not (reference and reference.pipeline_version_id):
        return dict(run.pipeline_spec or {})
    service = cluster.client.pipelines.pipeline_service_get_pipeline_version
    version = cluster.call(service, reference.pipeline_id, reference.pipeline_version_id)
    return dict(version.pipeline_spec or {})


def _read_archive(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """Argo's archive, whose folder a stock Kubeflow names by namespace, Workflow, day and pod."""
    use_store(cluster.profile)
    workflow, _, digest = step.pod.rpartition("-")
    scheme, _, rest = pipeline_root(cluster.profile).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    folder = storage.join(bucket, f"private-artifacts/{cluster.profile.namespace}/{workflow}")
    names = [name for name in storage.walk(folder) if name.endswith(f"-{digest}/main.log")]
    if not names:
        raise _NoLogError(f"nothing at {folder}")
    return storage.read_bytes(storage.join(folder, names[0])).decode(errors="replace")


def _read_executor_logs(cluster: Cluster, run: kfp_server_api.V2beta1Run, step: StepRow) -> str:
    """The copies of all attempts are in the step's folder of the run."""
    use_store(cluster.profile)
    folder = _folder_of(run_folder(cluster.profile, run), step)
    return storage.read_bytes(_newest_file(folder, "executor-logs")).decode(errors="replace")


def _folder_of(run: str, step: StepRow) -> str:
    """The folder in which a step has one folder for each time that Argo began it."""
    folder = storage.join(run, step.name)
    if step.step != step.name:
        raise _NoLogError(f"{folder} does not say which of its folders is that of {step.step}")
    return folder


def _newest_file(folder: str, name: str) -> str:
    """The newest file below a folder whose own name begins with `name`."""
    files = {path: file for path, file in storage.walk(folder).items() if path.rpartition("/")[2].startswith(name)}
    if not files:
        raise _NoLogError(f"nothing at {folder}")
    return storage.join(folder, max(files, key=lambda path: files[path].written))
