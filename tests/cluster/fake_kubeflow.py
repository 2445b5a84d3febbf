"""A Kubeflow Pipelines API server for tests: the v2beta1 REST API over real HTTP, with state and the real checks.

It behaves like the real server in these points (paths below backend/src/apiserver of kubeflow/pipelines):

- lists come in pages of 20 by default and at most 200, with an opaque token (list/list.go);
- filters are JSON predicates (filter/filter.go); sorting is by one field, `desc` after it (list/list.go);
- uploads are multipart with the field `uploadfile`, names in the query (server/pipeline_upload_server.go), and a
  duplicate is answered with 409; the file must parse as a pipeline spec (template/v2_template.go);
- names are unique: pipelines and experiments in a namespace, versions in a pipeline (storage/*_store.go), while runs
  and recurring runs may have equal names;
- inputs are checked against the spec: unknown and missing inputs are refused (template/v2_template.go);
- a run contains its own spec, or names a version, or a pipeline alone, and then gets its newest version
  (resource/resource_manager.go);
- recurring runs can be created, deleted, enabled and disabled, not updated; concurrency is 1 to 10, and times are
  those of robfig/cron: six fields (server/job_server.go);
- with a single user, lists refuse a namespace (server/experiment_server.go, TestListExperiments_SingleUser…); with
  several users, they require one, and callers are identified by bearer token: 401 without a token, 403 outside their
  namespaces (auth/);
- terminating a finished run is refused (resource/resource_manager.go).

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

Record = dict[str, Any]

_START = datetime(2026, 1, 1, tzinfo=UTC)
_FIELD_RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


@dataclass
class FakeKubeflow:
    """The server's state, which a test may change.

    Attributes:
        tokens: Namespaces that each bearer token may use; empty means that the server has a single user.
        outcomes: Final states of steps that do not succeed, by step.
        faults: Answers that replace the usual ones, in order, for requests whose "METHOD path" matches.
        logs: Logs of pods by name.
        kubernetes: Objects of the Kubernetes API by path; a number is answered as this HTTP status.
        requests: Every received request as "METHOD path".
    """

    tokens: dict[str, set[str]] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
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
    _specs: dict[str, Record] = field(default_factory=dict)
    _polls: dict[str, int] = field(default_factory=dict)
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
        run = {
            **body,
            "run_id": str(uuid.uuid4()),
            "pipeline_version_reference": reference,
            "state": "PENDING",
            "storage_state": "AVAILABLE",
            "created_at": self.now(),
            "recurring_run_id": recurring_run_id,
            "run_details": {"task_details": []},
        }
        self.runs[run["run_id"]] = run
        self._specs[run["run_id"]] = spec
        return run

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
        if run["state"] in {"SUCCEEDED", "FAILED", "CANCELED"}:
            return
        if run["state"] == "CANCELING":
            self._finish(run, "CANCELED")
            return
        spec = self._specs[run["run_id"]]
        order = list(_tasks(spec.get("pipeline_spec", spec)))
        poll = self._polls[run["run_id"]] = self._polls.get(run["run_id"], -1) + 1
        tasks = run["run_details"]["task_details"]
        if tasks and tasks[-1]["state"] == "RUNNING":
            tasks[-1].update(state=self.outcomes.get(tasks[-1]["display_name"], "SUCCEEDED"), end_time=self.now())
            if tasks[-1]["state"] == "FAILED":
                self._finish(run, "FAILED")
                return
        if poll < len(order):
            run["state"] = "RUNNING"
            driver = {"display_name": f"{order[poll]}-driver", "state": "SUCCEEDED"}
            step = {"display_name": order[poll], "state": "RUNNING", "pod_name": f"pod-{order[poll]}"}
            for task in (driver, step):
                tasks.append({"run_id": run["run_id"], "task_id": str(uuid.uuid4()), "start_time": self.now(), **task})
        else:
            self._finish(run, "SUCCEEDED")

    def _finish(self, run: Record, state: str) -> None:
        run.update(state=state, finished_at=self.now())


def _tasks(pipeline: Record) -> Iterator[str]:
    """The tasks in their order, a condition as a task before the tasks inside it."""
    step_order = ["validate-data", "preprocess", "train", "merge", "evaluate", "condition-1"]
    tasks = pipeline["root"]["dag"]["tasks"]
    for name in sorted(tasks, key=step_order.index):
        yield name
        yield from pipeline["components"][tasks[name]["componentRef"]["name"]].get("dag", {}).get("tasks", {})


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
    abort(
        Response(
            json.dumps({"error": message, "code": status, "message": message}), status, mimetype="application/json"
        )
    )


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
    known = set(getattr(kfp_server_api, model).attribute_map.values())
    assert set(record) <= known, set(record) - known
    return jsonify({name: value for name, value in record.items() if value is not None})


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
    answer: Record = {name: records[start : start + size], "total_size": len(records)}
    if more:
        answer["next_page_token"] = base64.urlsafe_b64encode(str(start + size).encode()).decode()
    for record in answer[name]:
        _answer(record, model)
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
    pipeline, *platform = yaml.safe_load_all(file.read())
    try:
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        for document in platform:
            json_format.ParseDict(document, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        _refuse(400, f"invalid pipeline spec: {error}")
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
            _refuse(401, "Request header error: there is no user identity header.")
        return None

    def _token() -> str:
        return request.headers.get("authorization", "").removeprefix("Bearer ")

    def check_access(namespace: str | None) -> None:
        if not fake.tokens:
            if namespace:
                _refuse(400, "In single-user mode, namespace cannot be used.")
            return
        if not namespace:
            _refuse(400, "Invalid request: namespace cannot be empty in multi-user mode.")
        if namespace not in fake.tokens[_token()]:
            _refuse(403, f"User is not authorized in namespace {namespace}")

    def check_unique(records: dict[str, Record], **fields: Any) -> None:
        if any(all(item.get(key) == value for key, value in fields.items()) for item in records.values()):
            _refuse(409, f"already exists: {fields}")

    @app.get(f"{api}/healthz")
    def health() -> Any:
        return jsonify({"multi_user": bool(fake.tokens), "pipeline_store": "database", "tag_name": "2.17.0"})

    @app.get(f"{api}/pipelines")
    def list_pipelines() -> Any:
        check_access(request.args.get("namespace"))
        wanted = request.args.get("namespace")
        found = [item for item in fake.pipelines.values() if item.get("namespace") == wanted]
        return _page(found, "pipelines", "V2beta1Pipeline")

    @app.post(f"{api}/pipelines")
    def create_pipeline() -> Any:
        body = _body("V2beta1Pipeline")
        check_access(body.get("namespace"))
        check_unique(fake.pipelines, display_name=body["display_name"], namespace=body.get("namespace"))
        created = {**body, "pipeline_id": str(uuid.uuid4()), "name": body["display_name"], "created_at": fake.now()}
        fake.pipelines[created["pipeline_id"]] = created
        return _answer(created, "V2beta1Pipeline")

    @app.post(f"{api}/pipelines/upload_version")
    def upload_version() -> Any:
        pipeline = fake.pipelines.get(request.args.get("pipelineid", "")) or _refuse(400, "no such pipeline")
        check_access(pipeline.get("namespace"))
        spec = _parse_upload()
        name = request.args.get("name") or _refuse(400, "no name")
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
        return _answer(created, "V2beta1PipelineVersion")

    @app.get(f"{api}/pipelines/<pipeline_id>/versions")
    def list_versions(pipeline_id: str) -> Any:
        pipeline = fake.pipelines.get(pipeline_id) or _refuse(404, "no such pipeline")
        check_access(pipeline.get("namespace"))
        found = [item for item in fake.versions.values() if item["pipeline_id"] == pipeline_id]
        return _page(found, "pipeline_versions", "V2beta1PipelineVersion")

    @app.get(f"{api}/experiments")
    def list_experiments() -> Any:
        wanted = request.args.get("namespace")
        check_access(wanted)
        found = [item for item in fake.experiments.values() if item.get("namespace") == wanted]
        return _page(found, "experiments", "V2beta1Experiment")

    @app.post(f"{api}/experiments")
    def create_experiment() -> Any:
        body = _body("V2beta1Experiment")
        check_access(body.get("namespace"))
        check_unique(fake.experiments, display_name=body["display_name"], namespace=body.get("namespace"))
        created = {**body, "experiment_id": str(uuid.uuid4()), "created_at": fake.now()}
        fake.experiments[created["experiment_id"]] = created
        return _answer(created, "V2beta1Experiment")

    def namespace_of(experiment_id: str | None) -> str | None:
        experiment = fake.experiments.get(experiment_id or "") or _refuse(404, "no such experiment")
        return experiment.get("namespace")

    @app.get(f"{api}/runs")
    def list_runs() -> Any:
        if experiment := request.args.get("experiment_id"):
            check_access(namespace_of(experiment))
            found = [item for item in fake.runs.values() if item["experiment_id"] == experiment]
        else:
            wanted = request.args.get("namespace")
            check_access(wanted)
            found = [item for item in fake.runs.values() if namespace_of(item["experiment_id"]) == wanted]
        return _page(found, "runs", "V2beta1Run")

    @app.post(f"{api}/runs")
    def create_run() -> Any:
        body = _body("V2beta1Run")
        check_access(namespace_of(body.get("experiment_id")))
        return _answer(fake.create_run(body), "V2beta1Run")

    def find_run(run_id: str) -> Record:
        run = fake.runs.get(run_id) or _refuse(404, f"Run {run_id} not found")
        check_access(namespace_of(run["experiment_id"]))
        return run

    @app.get(f"{api}/runs/<run_id>")
    def get_run(run_id: str) -> Any:
        run = find_run(run_id)
        fake.advance(run)
        return _answer(run, "V2beta1Run")

    @app.post(f"{api}/runs/<run_id>:terminate")
    def terminate(run_id: str) -> Any:
        run = find_run(run_id)
        if run["state"] in {"SUCCEEDED", "FAILED", "CANCELED"}:
            _refuse(400, "Failed to terminate a run. The run is over")
        run["state"] = "CANCELING"
        return jsonify({})

    @app.get("/apis/v1alpha1/runs/<run_id>/nodes/<node_id>/log")
    def read_log(run_id: str, node_id: str) -> Any:
        find_run(run_id)
        if node_id not in fake.logs:
            _refuse(500, "error reading log")
        return Response(fake.logs[node_id], mimetype="text/plain")

    @app.get(f"{api}/recurringruns")
    def list_recurring() -> Any:
        wanted = request.args.get("namespace")
        check_access(wanted)
        found = [item for item in fake.recurring_runs.values() if item.get("namespace") == wanted]
        return _page(found, "recurringRuns", "V2beta1RecurringRun")

    @app.post(f"{api}/recurringruns")
    def create_recurring() -> Any:
        body = _body("V2beta1RecurringRun")
        check_access(body.get("namespace"))
        namespace_of(body.get("experiment_id"))
        reference = body.get("pipeline_version_reference") or {}
        if not reference.get("pipeline_id"):
            _refuse(400, "no pipeline source")
        version = fake.version_of(reference)
        fake.check_parameters(version["pipeline_spec"], body["runtime_config"].get("parameters", {}))
        _check_cron(body["trigger"]["cron_schedule"]["cron"])
        if not 1 <= int(body["max_concurrency"]) <= 10:
            _refuse(400, "The max concurrency of the recurring run is out of range. Support 1-10.")
        status = "ENABLED" if body["mode"] == "ENABLE" else "DISABLED"
        created = {**body, "recurring_run_id": str(uuid.uuid4()), "created_at": fake.now(), "status": status}
        del created["mode"]
        fake.recurring_runs[created["recurring_run_id"]] = created
        return _answer(created, "V2beta1RecurringRun")

    def find_recurring(recurring_run_id: str) -> Record:
        found = fake.recurring_runs.get(recurring_run_id) or _refuse(404, "no such recurring run")
        check_access(found.get("namespace"))
        return found

    @app.post(f"{api}/recurringruns/<recurring_run_id>:enable")
    def enable(recurring_run_id: str) -> Any:
        find_recurring(recurring_run_id)["status"] = "ENABLED"
        return jsonify({})

    @app.post(f"{api}/recurringruns/<recurring_run_id>:disable")
    def disable(recurring_run_id: str) -> Any:
        find_recurring(recurring_run_id)["status"] = "DISABLED"
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
