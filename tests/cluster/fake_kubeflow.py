"""A Kubeflow Pipelines API server for tests: the v2beta1 REST API over real HTTP, with state and the real checks.

What it answers is held to `recordings/`, exchanges of a real Kubeflow Pipelines 2.17 (test_recordings.py replays each
of them); what runs do is in fake_workflow.py. Behaviors and their recordings:

- an empty list is `{}`; else items and `total_size`: single-user/GET_v2beta1.pipelines_200*;
- filters are JSON predicates (…_200_filter), a namespace may be given as empty with a single user;
- errors are gRPC statuses (`code`, `message`, `details`), those of uploads `error_message` and `error_details`:
  POST_v2beta1.runs_400, POST_v2beta1.pipelines.upload_400 and _409;
- uploads are multipart with the field `uploadfile`, names in the query; a duplicate is answered with 409, and without
  rights with 400: multi-user/POST_v2beta1.pipelines.upload_400;
- inputs are checked against the spec: POST_v2beta1.runs_400; a run without an experiment belongs to Default:
  POST_v2beta1.runs_200;
- times that are not known are the first second of 1970, a run has its states with their times, and no `run_details`
  before its first task: GET_v2beta1.runs.ID_200_PENDING;
- a schedule has `mode` and `status`, times of robfig/cron with six fields: POST_v2beta1.recurringruns_200 and _400;
- with several users, callers are identified by bearer token: GET_v2beta1.runs_401 and _403;
- terminating a finished run is refused: POST_v2beta1.runs.ID.terminate_400; one that was terminated ends as FAILED,
  without another sign (facts 20 of the recordings' README);
- a log has status 200 and the text for the pod's real name, else status 200 and `error_message`:
  GET_v1alpha1.runs.ID.nodes.NODE.log_200_error;
- the version may be "unknown": GET_v2beta1.healthz_200.

Not recorded, from the server's sources (paths below backend/src/apiserver of kubeflow/pipelines): pages of 20 by
default and at most 200 with an opaque token (list/list.go); sorting by one field, `desc` after it (list/list.go);
unknown inputs refused (template/v2_template.go); a pipeline alone means its newest version
(resource/resource_manager.go); a namespace refused with a single user, and required with several
(server/experiment_server.go); a concurrency of 1 to 10 (server/job_server.go); names unique for pipelines, experiments
and versions, not for runs and schedules (storage/*_store.go). Not recorded and without a source: faults (5xx, hangs,
login pages) and which requests answer them.

The models of `kfp-server-api` decide which fields requests and answers may have. Below /apis/ of other groups and
/api/v1 there are a few reads of the Kubernetes API, for the checks of `preflight`.
"""

import base64
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import kfp_server_api
import yaml
from flask import Flask, Response, abort, jsonify, request
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from tests.cluster.fake_workflow import FakeWorkflow

Record = dict[str, Any]

_START = datetime(2026, 1, 1, tzinfo=UTC)
_UNKNOWN_TIME = "1970-01-01T00:00:00Z"
_FINISHED = {"SUCCEEDED", "FAILED", "CANCELED"}
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 429: 8, 503: 14}  # of gRPC, by HTTP status
_FIELD_RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


@dataclass
class FakeKubeflow:
    """The server's state, which a test may change.

    Attributes:
        tokens: Namespaces that each bearer token may use; empty means that the server has a single user.
        outcomes: States of steps that do not succeed, by step; a list has one for each attempt (its pod was deleted),
            and PENDING is a step whose pod cannot start.
        skipped: Conditions that do not hold.
        faults: Answers that replace the usual ones, in order, for requests whose "METHOD path" matches.
        logs: Logs by step.
        kubernetes: Objects of the Kubernetes API by path; a number is answered as this HTTP status.
        requests: Every received request as "METHOD path".
        tag_name: The server's version; a server that was built by hand says "unknown".
        is_frozen: Whether runs stay as they are; otherwise a run goes on by one step each time it is read.
    """

    tokens: dict[str, set[str]] = field(default_factory=dict)
    outcomes: dict[str, str | list[str]] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    faults: list[tuple[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    kubernetes: dict[str, Any] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    pipelines: dict[str, Record] = field(default_factory=dict)
    versions: dict[str, Record] = field(default_factory=dict)
    experiments: dict[str, Record] = field(default_factory=dict)
    runs: dict[str, Record] = field(default_factory=dict)
    recurring_runs: dict[str, Record] = field(default_factory=dict)
    hangs: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    tag_name: str = "2.17.0"
    is_frozen: bool = False
    workflows: dict[str, FakeWorkflow] = field(default_factory=dict)
    _clock: int = 0

    def answer_next(self, pattern: str, *answers: Any) -> None:
        """Answer the next matching requests with an HTTP status, with a text, or not at all ("hang")."""
        self.faults += [(pattern, answer) for answer in answers]

    def tick(self, recurring_run_id: str) -> Record | None:
        """Start a recurring run as the server's controller does at the scheduled time."""
        schedule = self.recurring_runs[recurring_run_id]
        if schedule["status"] != "ENABLED":
            return None
        copied = ("pipeline_version_reference", "runtime_config", "service_account", "experiment_id", "plugins_input")
        body = {"display_name": f"{schedule['display_name']}-1", **{name: schedule.get(name) for name in copied}}
        return self.create_run(body, recurring_run_id)

    def now(self) -> str:
        """A time that grows with every call."""
        self._clock += 1
        return (_START + timedelta(seconds=self._clock)).isoformat().replace("+00:00", "Z")

    def create_run(self, body: Record, recurring_run_id: str | None = None) -> Record:
        spec, reference = body.get("pipeline_spec"), None
        if spec is None:
            version = self.version_of(body.get("pipeline_version_reference") or {})
            spec = version["pipeline_spec"]
            reference = {name: version[name] for name in ("pipeline_id", "pipeline_version_id")}
        self.check_parameters(spec, (body.get("runtime_config") or {}).get("parameters") or {})
        now = self.now()
        run = {
            **body,
            "experiment_id": body.get("experiment_id") or self.default_experiment(),
            "run_id": str(uuid.uuid4()),
            "pipeline_version_reference": reference,
            "storage_state": "AVAILABLE",
            "created_at": now,
            "scheduled_at": now,
            "finished_at": _UNKNOWN_TIME,
            "recurring_run_id": recurring_run_id,
            "state_history": [],
        }
        self.add_run(run, spec)
        return run

    def add_run(self, run: Record, spec: Record) -> None:
        """Add a run with the workflow that the server makes of a pipeline."""
        self.runs[run["run_id"]] = run
        pipeline = spec.get("pipeline_spec", spec)
        name = f"{pipeline['pipelineInfo']['name']}-{run['run_id'][:5]}"
        self.workflows[run["run_id"]] = FakeWorkflow(name, spec, self.outcomes, self.skipped, self.now)
        self._set_state(run, "PENDING")

    def default_experiment(self) -> str:
        for found in self.experiments.values():
            if found["display_name"] == "Default":
                return str(found["experiment_id"])
        return str(self.add_experiment({"display_name": "Default"})["experiment_id"])

    def add_experiment(self, body: Record) -> Record:
        created = {
            **body,
            "experiment_id": str(uuid.uuid4()),
            "created_at": self.now(),
            "storage_state": "AVAILABLE",
            "last_run_created_at": _UNKNOWN_TIME,
        }
        self.experiments[created["experiment_id"]] = created
        return created

    def version_of(self, reference: Record) -> Record:
        if wanted := reference.get("pipeline_version_id"):
            return self.versions.get(wanted) or _refuse(404, f"PipelineVersion {wanted} not found")
        pipeline = reference.get("pipeline_id") or _refuse(400, "no pipeline source")
        versions = [item for item in self.versions.values() if item["pipeline_id"] == pipeline]
        return max(versions, key=lambda item: item["created_at"]) if versions else _refuse(404, "no version")

    def check_parameters(self, spec: Record, given: Record) -> None:
        pipeline = spec.get("pipeline_spec", spec)
        inputs = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
        for name in given:
            name in inputs or _refuse(400, f"parameter: {name} is not found in pipeline")
        for name, description in inputs.items():
            if name not in given and "defaultValue" not in description and not description.get("isOptional"):
                _refuse(400, f"parameter {name} is not optional, yet has neither default value nor user provided value")

    def advance(self, run: Record) -> None:
        """Advance a run by one step, which happens every time somebody reads the run."""
        if run["state"] in _FINISHED:
            return
        workflow = self.workflows[run["run_id"]]
        if run["state"] == "CANCELING":
            workflow.cancel()
            self._set_state(run, "FAILED")
        else:
            self._set_state(run, workflow.advance())
        run["run_details"] = {"task_details": workflow.tasks(run["run_id"])}

    def retry(self, run: Record) -> None:
        """Begin the failed steps again; not recorded: when the server refuses it."""
        self.workflows[run["run_id"]].retry()
        run["finished_at"] = _UNKNOWN_TIME
        self._set_state(run, "RUNNING")

    def pod_of(self, run_id: str, step: str) -> str:
        """The name of a step's newest pod, as Kubernetes knows it."""
        names = [name for name, node in self.workflows[run_id].pods().items() if node.step == step]
        return names[-1]

    def _set_state(self, run: Record, state: str) -> None:
        if run.get("state") != state:
            run["state"] = state
            run["state_history"].append({"update_time": self.now(), "state": state})
            if state in _FINISHED:
                run["finished_at"] = self.now()


@contextmanager
def serving(fake: FakeKubeflow) -> Iterator[FakeKubeflow]:
    """Answer HTTP requests during a block."""
    server = make_server("127.0.0.1", 0, _routes(fake), threaded=True)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.hangs.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _refuse(status: int, message: str) -> Any:
    code = _CODES.get(status, 13)
    if "/upload" in request.path:
        body: Record = {"error_message": message, "error_details": message}
        kind = "text/plain" if status == 400 else "application/json"
    else:
        kind = "application/json"
        detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": code, "message": message}
        body = {"code": code, "message": message, "details": [detail]}
    abort(Response(json.dumps(body), status, mimetype=kind))


def _body(model: str) -> Record:
    """The request's body; refused unless the model has all its fields and accepts their values."""
    body = request.get_json()
    known = set(getattr(kfp_server_api, model).attribute_map.values())
    if unknown := set(body) - known:
        _refuse(400, f"unknown field {sorted(unknown)}")
    try:
        kfp_server_api.ApiClient().deserialize(SimpleNamespace(data=json.dumps(body)), model)
    except (ValueError, TypeError) as error:
        _refuse(400, str(error))
    return body


def _answer(record: Record, model: str) -> Response:
    return jsonify(_known(record, model))


def _known(record: Record, model: str) -> Record:
    """A record without what has no value, of fields that the model has."""
    known = set(getattr(kfp_server_api, model).attribute_map.values())
    assert set(record) <= known, set(record) - known
    return {name: value for name, value in record.items() if value is not None}


def _page(records: list[Record], name: str, model: str) -> Response:
    """One page of the records that match the filter, sorted."""
    for predicate in json.loads(request.args.get("filter") or "{}").get("predicates", []):
        assert predicate["operation"] in (1, "EQUALS")
        records = [item for item in records if item.get(predicate["key"]) == predicate["stringValue"]]
    by, _, direction = (request.args.get("sort_by") or "created_at").partition(" ")
    records = sorted(records, key=lambda item: item.get(by) or "", reverse=direction == "desc")
    size = int(request.args.get("page_size") or 20)
    if not 0 < size <= 200:
        _refuse(400, f"The page size should be between 1 and 200. Got {size}")
    token = request.args.get("page_token")
    start = int(base64.urlsafe_b64decode(token)) if token else 0
    more = start + size < len(records)
    if not records:
        return jsonify({})
    answer: Record = {name: records[start : start + size], "total_size": len(records)}
    if more:
        answer["next_page_token"] = base64.urlsafe_b64encode(str(start + size).encode()).decode()
    answer[name] = [_known(record, model) for record in answer[name]]
    return jsonify(answer)


def _check_cron(cron: str) -> None:
    fields = cron.split()
    if len(fields) != 6:
        _refuse(400, f"Schedule cron is not a supported format: {cron}")
    for text, (lowest, highest) in zip(fields, _FIELD_RANGES, strict=True):
        for number in re.findall(r"(?<!/)\b\d+", text):
            lowest <= int(number) <= highest or _refuse(400, f"Schedule cron is not a supported format: {cron}")


def _parse_upload() -> Record:
    file = request.files.get("uploadfile") or _refuse(400, "Failed to read pipeline from file")
    try:
        pipeline, *platform = yaml.safe_load_all(file.read())
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        for document in platform:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
    except (yaml.YAMLError, json_format.ParseError):
        _refuse(400, "Failed to read a pipeline spec file")
    return {"pipeline_spec": pipeline, "platform_spec": platform[0]} if platform else pipeline


def _routes(fake: FakeKubeflow) -> Flask:
    app = Flask("kubeflow")
    api = "/apis/v2beta1"

    @app.errorhandler(HTTPException)
    def as_json(error: HTTPException) -> Any:
        return error.response or (jsonify({"error": error.description, "code": error.code}), error.code)

    @app.before_request
    def faults_and_tokens() -> Any:
        line = f"{request.method} {request.path}"
        fake.requests.append(line)
        for fault in fake.faults:
            if re.search(fault[0], line):
                fake.faults.remove(fault)
                if fault[1] == "hang":
                    fake.hangs.wait(20)
                    return Response("", 503)
                if isinstance(fault[1], str):
                    kind = "text/html" if fault[1].startswith("<") else "application/json"
                    return Response(fault[1], 200, mimetype=kind)
                _refuse(fault[1], "injected")
        guarded = request.path.startswith(api) and not request.path.endswith("/healthz")
        if fake.tokens and guarded and _token() not in fake.tokens:
            refuse_upload()
            _refuse(401, "Request header error: there is no user identity header.")
        return None

    def _token() -> str:
        return request.headers.get("authorization", "").removeprefix("Bearer ")

    def refuse_upload() -> None:
        if "/upload" in request.path:
            _refuse(400, "Failed to create a pipeline")

    def check_access(namespace: str | None) -> None:
        if not fake.tokens:
            if namespace:
                _refuse(400, "In single-user mode, namespace cannot be used.")
            return
        if not namespace:
            _refuse(400, "Invalid request: namespace cannot be empty in multi-user mode.")
        if namespace not in fake.tokens[_token()]:
            refuse_upload()
            _refuse(403, f"User is not authorized in namespace {namespace}")

    def check_unique(records: dict[str, Record], **fields: Any) -> None:
        if any(all(item.get(key) == value for key, value in fields.items()) for item in records.values()):
            _refuse(409, f"already exists: {fields}")

    @app.get(f"{api}/healthz")
    def health() -> Any:
        known = {"commit_sha": "unknown", "pipeline_store": "database"}
        return jsonify({**known, "multi_user": bool(fake.tokens), "tag_name": fake.tag_name})

    @app.get(f"{api}/pipelines")
    def list_pipelines() -> Any:
        wanted = request.args.get("namespace") or None
        check_access(wanted)
        found = [item for item in fake.pipelines.values() if item.get("namespace") == wanted]
        return _page(found, "pipelines", "V2beta1Pipeline")

    @app.post(f"{api}/pipelines")
    def create_pipeline() -> Any:
        body = _body("V2beta1Pipeline")
        check_access(body.get("namespace"))
        more = {name: body.get(name) for name in ("description", "namespace")}
        return _answer(add_pipeline(body["display_name"], **more), "V2beta1Pipeline")

    def add_pipeline(name: str, **more: Any) -> Record:
        check_unique(fake.pipelines, display_name=name, namespace=more.get("namespace"))
        created = {**more, "display_name": name, "pipeline_id": str(uuid.uuid4()), "name": name}
        fake.pipelines[created["pipeline_id"]] = {**created, "created_at": fake.now()}
        return fake.pipelines[created["pipeline_id"]]

    def add_version(pipeline: Record, name: str, spec: Record) -> Record:
        check_unique(fake.versions, display_name=name, pipeline_id=pipeline["pipeline_id"])
        created = {
            "pipeline_id": pipeline["pipeline_id"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": name,
            "name": name,
            "created_at": fake.now(),
            "pipeline_spec": spec,
        }
        fake.versions[created["pipeline_version_id"]] = created
        return created

    @app.post(f"{api}/pipelines/upload")
    def upload() -> Any:
        namespace = request.args.get("namespace")
        check_access(namespace)
        name = request.args.get("name") or _refuse(400, "no name")
        spec = _parse_upload()
        pipeline = add_pipeline(name, namespace=namespace)
        add_version(pipeline, name, spec)
        return _answer(pipeline, "V2beta1Pipeline")

    @app.get(f"{api}/pipelines/<pipeline_id>")
    def get_pipeline(pipeline_id: str) -> Any:
        pipeline = fake.pipelines.get(pipeline_id) or _refuse(404, f"Pipeline {pipeline_id} not found")
        check_access(pipeline.get("namespace"))
        return _answer(pipeline, "V2beta1Pipeline")

    @app.get(f"{api}/pipelines/<pipeline_id>/versions/<version_id>")
    def get_version(pipeline_id: str, version_id: str) -> Any:
        check_access((fake.pipelines.get(pipeline_id) or {}).get("namespace"))
        version = fake.version_of({"pipeline_id": pipeline_id, "pipeline_version_id": version_id})
        return _answer(version, "V2beta1PipelineVersion")

    @app.post(f"{api}/pipelines/upload_version")
    def upload_version() -> Any:
        pipeline = fake.pipelines.get(request.args.get("pipelineid", "")) or _refuse(400, "no such pipeline")
        check_access(pipeline.get("namespace"))
        spec = _parse_upload()
        name = request.args.get("name") or _refuse(400, "no name")
        return _answer(add_version(pipeline, name, spec), "V2beta1PipelineVersion")

    @app.get(f"{api}/pipelines/<pipeline_id>/versions")
    def list_versions(pipeline_id: str) -> Any:
        pipeline = fake.pipelines.get(pipeline_id) or _refuse(404, "no such pipeline")
        check_access(pipeline.get("namespace"))
        found = [item for item in fake.versions.values() if item["pipeline_id"] == pipeline_id]
        return _page(found, "pipeline_versions", "V2beta1PipelineVersion")

    @app.get(f"{api}/experiments")
    def list_experiments() -> Any:
        wanted = request.args.get("namespace") or None
        check_access(wanted)
        found = [item for item in fake.experiments.values() if item.get("namespace") == wanted]
        return _page(found, "experiments", "V2beta1Experiment")

    @app.post(f"{api}/experiments")
    def create_experiment() -> Any:
        body = _body("V2beta1Experiment")
        check_access(body.get("namespace"))
        check_unique(fake.experiments, display_name=body["display_name"], namespace=body.get("namespace"))
        return _answer(fake.add_experiment(body), "V2beta1Experiment")

    @app.get(f"{api}/experiments/<experiment_id>")
    def get_experiment(experiment_id: str) -> Any:
        check_access(namespace_of(experiment_id))
        return _answer(fake.experiments[experiment_id], "V2beta1Experiment")

    def namespace_of(experiment_id: str | None) -> str | None:
        experiment = fake.experiments.get(experiment_id or "") or _refuse(404, "no such experiment")
        return experiment.get("namespace")

    @app.get(f"{api}/runs")
    def list_runs() -> Any:
        if experiment := request.args.get("experiment_id"):
            check_access(namespace_of(experiment))
            found = [item for item in fake.runs.values() if item["experiment_id"] == experiment]
        else:
            wanted = request.args.get("namespace") or None
            check_access(wanted)
            found = [item for item in fake.runs.values() if namespace_of(item["experiment_id"]) == wanted]
        return _page(found, "runs", "V2beta1Run")

    @app.post(f"{api}/runs")
    def create_run() -> Any:
        body = _body("V2beta1Run")
        check_access(namespace_of(body.get("experiment_id") or fake.default_experiment()))
        return _answer(fake.create_run(body), "V2beta1Run")

    def find_run(run_id: str) -> Record:
        run = fake.runs.get(run_id) or _refuse(404, f"Run {run_id} not found")
        check_access(namespace_of(run["experiment_id"]))
        return run

    @app.get(f"{api}/runs/<run_id>")
    def get_run(run_id: str) -> Any:
        run = find_run(run_id)
        if not fake.is_frozen:
            fake.advance(run)
        return _answer(run, "V2beta1Run")

    @app.post(f"{api}/runs/<run_id>:terminate")
    def terminate(run_id: str) -> Any:
        run = find_run(run_id)
        if run["state"] in _FINISHED:
            _refuse(400, f"Failed to terminate a run {run_id}. Row not found")
        run["state"] = "CANCELING"
        return jsonify({})

    @app.post(f"{api}/runs/<run_id>:retry")
    def retry(run_id: str) -> Any:
        run = find_run(run_id)
        if run["state"] != "FAILED":
            _refuse(400, f"Failed to retry a run {run_id}. Only a failed run can be retried")
        fake.retry(run)
        return jsonify({})

    @app.get("/apis/v1alpha1/runs/<run_id>/nodes/<node_id>/log")
    def read_log(run_id: str, node_id: str) -> Any:
        find_run(run_id)
        pod = fake.workflows[run_id].pods().get(node_id)
        if pod is None or pod.step not in fake.logs:
            message = f"BadRequestError: Failed to read logs for run {run_id}: the specified key does not exist."
            refusal = json.dumps({"error_message": message, "error_details": message})
            return Response(refusal, mimetype="text/plain")
        return Response(fake.logs[pod.step], mimetype="text/plain")

    @app.get(f"{api}/recurringruns")
    def list_recurring() -> Any:
        wanted = request.args.get("namespace") or None
        check_access(wanted)
        found = [item for item in fake.recurring_runs.values() if item.get("namespace") == (wanted or "kubeflow")]
        return _page(found, "recurringRuns", "V2beta1RecurringRun")

    @app.post(f"{api}/recurringruns")
    def create_recurring() -> Any:
        body = _body("V2beta1RecurringRun")
        check_access(body.get("namespace"))
        _check_cron(body["trigger"]["cron_schedule"]["cron"])
        body.setdefault("experiment_id", None if fake.tokens else fake.default_experiment())
        namespace_of(body.get("experiment_id"))
        reference = body.get("pipeline_version_reference") or {}
        if not reference.get("pipeline_id"):
            _refuse(400, "no pipeline source")
        version = fake.version_of(reference)
        fake.check_parameters(version["pipeline_spec"], body["runtime_config"].get("parameters", {}))
        if not 1 <= int(body["max_concurrency"]) <= 10:
            _refuse(400, "The max concurrency of the recurring run is out of range. Support 1-10.")
        status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
        now = fake.now()
        created = {
            **body,
            "recurring_run_id": str(uuid.uuid4()),
            "created_at": now,
            "updated_at": now,
            "status": status,
        }
        created.setdefault("namespace", "kubeflow")  # the server's own, with a single user
        fake.recurring_runs[created["recurring_run_id"]] = created
        return _answer(created, "V2beta1RecurringRun")

    def find_recurring(recurring_run_id: str) -> Record:
        found = fake.recurring_runs.get(recurring_run_id) or _refuse(404, "no such recurring run")
        check_access(found.get("namespace") if fake.tokens else None)
        return found

    @app.get(f"{api}/recurringruns/<recurring_run_id>")
    def get_recurring(recurring_run_id: str) -> Any:
        return _answer(find_recurring(recurring_run_id), "V2beta1RecurringRun")

    @app.post(f"{api}/recurringruns/<recurring_run_id>:enable")
    def enable(recurring_run_id: str) -> Any:
        find_recurring(recurring_run_id).update(mode="ENABLE", status="ENABLED")
        return jsonify({})

    @app.post(f"{api}/recurringruns/<recurring_run_id>:disable")
    def disable(recurring_run_id: str) -> Any:
        find_recurring(recurring_run_id).update(mode="DISABLE", status="DISABLED")
        return jsonify({})

    @app.delete(f"{api}/recurringruns/<recurring_run_id>")
    def delete(recurring_run_id: str) -> Any:
        find_recurring(recurring_run_id)
        del fake.recurring_runs[recurring_run_id]
        return jsonify({})

    @app.get("/version")  # MLflow's
    @app.get("/api/v1/<path:rest>")
    @app.get("/apis/<group>/<path:rest>")
    def kubernetes(rest: str = "", group: str = "") -> Any:
        found = fake.kubernetes.get(request.path, 404)
        if isinstance(found, int):
            return jsonify({"kind": "Status", "code": found, "reason": "Forbidden"}), found
        return Response(found) if isinstance(found, str) else jsonify(found)

    return app
