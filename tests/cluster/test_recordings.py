"""The fake server answers as a real Kubeflow Pipelines 2.17 did: each recorded request gets the same status and shape.

`recordings/` holds exchanges and objects of a real server, without what no test needs: addresses, images, commands and
the bodies of uploads. A new release of Kubeflow is followed by recording again (see docs/testing-on-a-cluster.md).
"""

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import urllib3
import yaml

from tests.cluster.fake_kubeflow import FakeKubeflow, serving
from tests.cluster.fake_workflow import FakeWorkflow

RECORDINGS = Path(__file__).parent / "recordings"
EXCHANGES = sorted(path.relative_to(RECORDINGS).as_posix() for path in RECORDINGS.glob("*-user/*.json"))
NAMESPACE = "team-a"
Record = dict[str, Any]


def recorded(name: str) -> Record:
    content: Record = json.loads((RECORDINGS / name).read_text())
    return content


def pipeline(kind: str) -> Record:
    """A compiled pipeline of 0.1.0, as the server gives it back."""
    names = {
        "finetune": "single-user/POST_v2beta1.pipelines.upload_version_200.json",
        "retrain": "single-user/GET_v2beta1.pipelines.ID.versions.ID_200.json",
    }
    spec: Record = recorded(names[kind])["response"]["pipeline_spec"]
    return spec


def steps(*names: str, **more: Record) -> Record:
    """A pipeline of steps that do not depend on each other."""
    tasks = {name: {"componentRef": {"name": f"comp-{name}"}, "taskInfo": {"name": name}, **more} for name in names}
    components = {f"comp-{name}": {"executorLabel": f"exec-{name}"} for name in names}
    return {"pipelineInfo": {"name": names[0]}, "components": components, "root": {"dag": {"tasks": tasks}}}


@pytest.mark.parametrize("name", EXCHANGES)
def test_each_recorded_request_is_answered_alike(name: str) -> None:
    exchange = recorded(name)
    with serving(FakeKubeflow()) as fake:
        token = seed(fake, exchange, several_users=name.startswith("multi-user"))
        answer = urllib3.request(
            exchange["method"],
            f"{fake.url}{exchange['path']}?{exchange['query']}",
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=10,
            **body(exchange),
        )
    text = answer.data.decode()
    assert answer.status == exchange["status"], text
    assert answer.headers["content-type"].split(";")[0] == exchange["response_type"].split(";")[0]
    if isinstance(exchange["response"], str):
        assert not text.startswith("{")
    else:
        assert shape(answer.json()) == shape(exchange["response"])
        if "code" in exchange["response"]:
            assert answer.json()["code"] == exchange["response"]["code"]


def shape(value: Any, key: str = "") -> Any:
    """The keys and types of an answer; what a caller fills freely counts as one."""
    if key in {"parameters", "pipeline_spec"}:
        return key
    if isinstance(value, dict):
        return {name: shape(item, name) for name, item in sorted(value.items())}
    if isinstance(value, list):
        return [functools.reduce(_merge, map(shape, value), {})]
    return type(value).__name__


def _merge(one: Any, other: Any) -> Any:
    """The shape of a list's items: the keys that any of them has."""
    if isinstance(one, list) and isinstance(other, list):
        return [_merge(one[0], other[0])]
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return {name: _merge(one.get(name, {}), other.get(name, one.get(name))) for name in sorted({*one, *other})}


def body(exchange: Record) -> Record:
    if exchange["request_type"] == "multipart/form-data":
        text = (
            yaml.safe_dump_all(list(_documents(exchange))) if exchange["request"].endswith("yaml") else "# A\n\n*B*: c:"
        )
        return {"fields": {"uploadfile": (exchange["request"], text)}}
    return {"json": exchange["request"]} if exchange["request"] else {}


def _documents(exchange: Record) -> list[Record]:
    spec = exchange["response"].get("pipeline_spec") or pipeline("finetune")
    return [spec["pipeline_spec"], spec["platform_spec"]]


def seed(fake: FakeKubeflow, exchange: Record, several_users: bool) -> str:
    """Give the fake what the recorded answer shows that the real server had; returns the caller's token."""
    fake.is_frozen = True
    token = ""
    if several_users:
        fake.tokens.update({"alice": {NAMESPACE}, "eve": set()})
        refused = exchange["status"] == 403 or "Failed to create a pipeline" in str(exchange["response"])
        token = "" if exchange["status"] == 401 else "eve" if refused else "alice"
    namespace = {"namespace": NAMESPACE} if several_users else {}
    kind, *ids = re.sub(r"^/apis/v[^/]*/", "", exchange["path"]).split("/")
    known = re.split(":", ids[0])[0] if ids and exchange["status"] != 404 else ""
    answer = exchange["response"] if isinstance(exchange["response"], dict) else {}
    sent = exchange["request"] if isinstance(exchange["request"], dict) else {}
    wanted = parse_qs(exchange["query"])
    reference = sent.get("pipeline_version_reference") or answer.get("pipeline_version_reference") or {}

    spec = answer.get("pipeline_spec") or pipeline("finetune")
    pipeline_id = reference.get("pipeline_id") or wanted.get("pipelineid", [known if kind == "pipelines" else ""])[0]
    if pipeline_id and "upload" not in pipeline_id:
        _add_pipeline(fake, pipeline_id, "minicpmv-finetune", **namespace)
        version_id = reference.get("pipeline_version_id") or (ids[2] if len(ids) > 2 else "v")
        if answer and not exchange["path"].endswith("upload_version") and "filter" not in exchange["query"]:
            _add_version(fake, pipeline_id, version_id, spec)
    if exchange["status"] == 409:
        _add_pipeline(fake, "p", wanted["name"][0], **namespace)
    for key, name in (("pipelines", "curl-dev"), ("recurringRuns", "each-two-minutes")):
        for found in answer.get(key, []):
            fake.pipelines["p"] = {"pipeline_id": "p", "display_name": name, **namespace}
            (fake.pipelines if key == "pipelines" else fake.recurring_runs)[name] = found

    own = {"experiment_id": "own", "display_name": "e", **namespace}
    if kind == "runs" and known and "experiment_id" not in answer:
        fake.experiments["own"] = own
        answer = answer | {"experiment_id": "own"}
    experiments = [*answer.get("experiments", []), *([answer] if kind == "experiments" and known else [])]
    fake.experiments.update({found["experiment_id"]: found for found in experiments})
    for source in (sent, answer, {"experiment_id": wanted.get("experiment_id", [""])[0]}):
        if identity := source.get("experiment_id"):
            fake.experiments.setdefault(identity, {"experiment_id": identity, "display_name": "e", **namespace})
    if kind == "recurringruns" and known:
        fake.recurring_runs[known] = answer | {
            "recurring_run_id": known,
            "namespace": NAMESPACE if several_users else "kubeflow",
        }
    if kind == "runs" and known:
        _add_run(fake, known, answer, spec, exchange)
    for found in answer.get("runs", []):
        fake.experiments.setdefault(found["experiment_id"], {"experiment_id": found["experiment_id"], **namespace})
        _add_run(fake, found["run_id"], found, pipeline("finetune"), exchange)
    return token


def _add_pipeline(fake: FakeKubeflow, identity: str, name: str, **more: str) -> None:
    times = {"created_at": fake.now()}
    fake.pipelines[identity] = {"pipeline_id": identity, "display_name": name, "name": name, **times, **more}


def _add_version(fake: FakeKubeflow, pipeline_id: str, identity: str, spec: Record) -> None:
    names = {"pipeline_id": pipeline_id, "pipeline_version_id": identity, "display_name": "v", "name": "v"}
    fake.versions[identity] = {**names, "created_at": fake.now(), "pipeline_spec": spec}


def _add_run(fake: FakeKubeflow, run_id: str, answer: Record, spec: Record, exchange: Record) -> None:
    """A run that has come as far as the recorded one."""
    made_by_fake = {"state", "state_history", "run_details", "finished_at"}
    run = {
        **{name: value for name, value in answer.items() if name not in made_by_fake},
        **{"run_id": run_id, "experiment_id": answer.get("experiment_id") or fake.default_experiment()},
        **{"state_history": [], "finished_at": "1970-01-01T00:00:00Z"},
    }
    fake.add_run(run, spec)
    state = answer.get("state", "SUCCEEDED" if exchange["status"] == 400 else "RUNNING")
    fake.outcomes |= dict.fromkeys(("fail", "validate-data"), "FAILED") if state == "FAILED" else {}
    for _ in range({"PENDING": 4 if "run_details" in answer else 0, "RUNNING": 3}.get(state, 20)):
        fake.advance(run)
    if state == "PENDING" and "run_details" in answer:
        # The server had the metadata store's entries before the workflow's own.
        tasks = [task for task in run["run_details"]["task_details"] if "display_name" not in task][:1]
        run |= {"state": state, "run_details": {"task_details": tasks}, "finished_at": "1970-01-01T00:00:00Z"}
        run["state_history"] = run["state_history"][:1]
    if isinstance(exchange["response"], str):
        # Recorded with the id of `validate-data(0)`; fact 4 says that other such ids were refused.
        fake.logs["validate-data"] = exchange["response"]
        exchange["path"] = re.sub("nodes/.*/log", f"nodes/{fake.pod_of(run_id, 'validate-data')}/log", exchange["path"])


# Recorded runs of whole pipelines: what they ran, and how steps ended there. The loop's spec was not recorded.
RUNS: dict[str, tuple[Record, dict[str, Any], set[str]]] = {
    "run-digits-1": (pipeline("finetune"), {}, set()),
    "run-kill-1": (pipeline("finetune"), {"train": ["FAILED", "SUCCEEDED"]}, {"condition-1"}),
    "run-sdk-doc": (pipeline("finetune"), {"validate-data": "FAILED"}, set()),
    "run-retried-by-hand": (pipeline("finetune"), {"validate-data": "FAILED"}, set()),
    "run-retrain-1": (pipeline("retrain"), {}, set()),
    "run-retrain-2": (pipeline("retrain"), {}, {"condition-2"}),
    "run-retrain-bad": (pipeline("retrain"), {"validate-data": "FAILED"}, set()),
    "run-exit-75-with-set-retry-3": (steps("fail", retryPolicy={"maxRetryCount": 3}), {"fail": "FAILED"}, set()),
    "run-out-of-memory": (steps("hungry", retryPolicy={"maxRetryCount": 1}), {"hungry": "FAILED"}, set()),
    "run-waiting": (
        steps("gpu", "noimage", "nosecret"),
        dict.fromkeys(("gpu", "noimage", "nosecret"), "PENDING"),
        set(),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_the_recorded_tasks(name: str) -> None:
    run, (spec, outcomes, skipped) = recorded(f"objects/{name}.json"), RUNS[name]
    tasks = [task for task in run["run_details"]["task_details"] if "display_name" in task]
    workflow = next(task["display_name"] for task in tasks if re.search(r"-[a-z0-9]{5}$", task["display_name"]))
    fake = FakeWorkflow(workflow, spec, outcomes, skipped, FakeKubeflow().now)
    state = [fake.advance() for _ in range(20)][-1]
    if name == "run-retried-by-hand":
        fake.retry()
        state = [fake.advance() for _ in range(20)][-1]
    assert state == run["state"]
    made = [task for task in fake.tasks("r") if "display_name" in task]
    assert Counter(map(_entry, made)) == Counter(map(_entry, tasks))


def _entry(task: Record) -> tuple[Any, ...]:
    """What counts of a task: its name, how it ended, and the ids of the nodes after it."""
    after = sorted(child["pod_name"] for child in task.get("child_tasks", []))
    return task["display_name"], task.get("state"), task["end_time"].startswith("0001"), tuple(after)


def test_a_loop_has_the_recorded_tasks() -> None:
    tasks = recorded("objects/run-partitions.json")["run_details"]["task_details"]
    inner = {"preprocess-part": {"componentRef": {"name": "comp-preprocess-part"}}}
    spec = steps("for-loop-2")
    spec["components"] = {"comp-for-loop-2": {"dag": {"tasks": inner}}, "comp-preprocess-part": {"executorLabel": "e"}}
    spec["root"]["dag"]["tasks"]["for-loop-2"]["parameterIterator"] = {"items": {"raw": "[0, 1]"}}
    fake = FakeWorkflow("w", spec, {}, set(), FakeKubeflow().now)
    assert [fake.advance() for _ in range(4)][-1] == "SUCCEEDED"
    loop = re.compile("iteration|for-loop|preprocess-part")
    expected = Counter(task["display_name"] for task in tasks if loop.match(task.get("display_name", "")))
    made = Counter(task["display_name"] for task in fake.tasks("r") if loop.match(task.get("display_name", "")))
    assert made == expected


def test_pods_are_called_as_recorded() -> None:
    pods: Any = recorded("objects/pods-out-of-memory.json")
    fake = FakeWorkflow("hungry-vbvgp", *RUNS["run-out-of-memory"], FakeKubeflow().now)
    fake.advance()
    assert {pod["name"] for pod in pods} <= set(fake.pods())
