"""The acceptance suite against a real Kubeflow Pipelines: `make test-cluster`, see docs/testing-on-a-cluster.md.

The caller names the cluster: `KF_PIPELINES_ENDPOINT`, `KUBECONFIG`, a profile by `MINICPMV_FINETUNE_PROFILE` (with
images that the cluster can pull, and for several users `MINICPMV_FINETUNE_NAMESPACE` and `KF_PIPELINES_TOKEN`), and the
store's keys as `AWS_*` if they are not to come from the cluster's Secret. Without these every test here is skipped, and
so is what the cluster lacks, with the reason. Runs with their files and pods, schedules, the experiment, data and what
is in MLflow are removed at the end.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.cluster.commands import Answer

if TYPE_CHECKING:
    from minicpmv_finetune.kubeflow.profile import MLflow

NEEDED = ("KUBECONFIG", "KF_PIPELINES_ENDPOINT", "MINICPMV_FINETUNE_PROFILE")
COMMAND = [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()"]
SMALL: dict[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 3e-3,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 32,
    "training_flags": {"lr_scheduler_type": "cosine", "warmup_steps": 0.3, "save_steps": 10},
    "evaluation_options": {"max_new_tokens": 16, "batch_size": 32},
    "registered_model": "",
}
"""Inputs with which a tiny model learns the digits in about a minute of two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.cluster)
        needed = NEEDED[:1] if item.path.stem == "test_manifests_on_a_server" else NEEDED
        missing = [name for name in needed if not os.environ.get(name)]
        if os.environ.get("CLUSTER_TESTS") != "1":
            item.add_marker(pytest.mark.skip(reason="runs in `make test-cluster` alone"))
        elif missing:
            item.add_marker(pytest.mark.skip(reason=f"needs a real cluster: {', '.join(missing)} not set"))


@dataclass
class RealCluster:
    """The cluster that the environment names, and what the suite has made there.

    Attributes:
        word: Part of every name that the suite gives.
        store: Folder in the object store for the suite's data.
        namespace: Namespace of the runs, as the server says.
        has_several_users: Whether the server identifies its callers.
        runs: Ids of the runs that were started.
        schedules: Names of the schedules that were applied.
    """

    word: str
    store: str
    namespace: str
    has_several_users: bool
    runs: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)

    @property
    def experiment(self) -> str:
        return f"acceptance-{self.word}"

    def command(self, *words: str | Path, timeout: float = 1800) -> Answer:
        done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=timeout)
        return Answer(done.returncode, done.stdout, done.stderr)

    def submit(self, name: str, inputs: Mapping[str, Any], *more: str, wait: bool = True) -> Answer:
        """Start a run without GPUs; its id is remembered for the end."""
        given = [word for key, value in inputs.items() for word in ("-p", f"{key}={as_text(value)}")]
        words = ["submit", "--gpus", "0", "--name", f"{name}-{self.word}", "--experiment", self.experiment, *given]
        started = self.command(*words, "--output", "json", *more)
        assert started.out, started.err
        self.runs.append(started.json["run_id"])
        if not wait:
            return started
        return self.command(*words, "--wait", *more)

    def start_unchecked(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Start a run as the form of the UI does, without the checks of `submit`; returns its id."""
        from minicpmv_finetune.inputs.table import defaults
        from minicpmv_finetune.kubeflow.client import connect
        from minicpmv_finetune.kubeflow.profile import chosen_profile
        from minicpmv_finetune.kubeflow.submit import Request, submit
        from minicpmv_finetune.pipelines import pipeline_of

        pipeline = pipeline_of("finetune")
        given = {**defaults(pipeline.inputs), **inputs}
        request = Request(pipeline, given, f"{name}-{self.word}", self.experiment)
        self.runs.append(submit(connect(chosen_profile().with_gpus(0)), request).run_id)
        return self.runs[-1]

    def steps(self, run: str) -> dict[str, dict[str, Any]]:
        return {row["step"]: row for row in self.command("runs", run, "--output", "json").json}

    def state(self, run: str) -> str:
        rows = self.command("runs", "--experiment", self.experiment, "--output", "json").json
        return str(next(row["state"] for row in rows if row["run_id"] == run))

    def kubectl(self, *words: str) -> str:
        kubectl = Path(sys.executable).with_name("kubectl")
        done = subprocess.run([kubectl, "-n", self.namespace, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def may(self, verb: str, resource: str, account: str) -> bool:
        kubectl = Path(sys.executable).with_name("kubectl")
        words = ["-n", self.namespace, "auth", "can-i", verb, resource, "--as", account]
        return subprocess.run([kubectl, *words], capture_output=True, timeout=120).returncode == 0

    def pods(self, run: str, step: str) -> list[dict[str, Any]]:
        labels = f"pipeline/runid={run},app.kubernetes.io/component={step}"
        return list(json.loads(self.kubectl("get", "pods", "-l", labels, "-o", "json"))["items"])


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def eventually(what: Callable[[], Any], seconds: float, every: float = 5.0) -> Any:
    """What the function returns as soon as it is true; fails after this time."""
    deadline = time.monotonic() + seconds
    while True:
        if found := what():
            return found
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(every)


@pytest.fixture(scope="session")
def cluster() -> Iterator[RealCluster]:
    """The cluster, from which everything is removed again."""
    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.profile import chosen_profile
    from minicpmv_finetune.kubeflow.store import use_store

    profile = chosen_profile()
    connected = connect(profile)
    use_store(profile)
    word = uuid.uuid4().hex[:6]
    root = os.environ.get("CLUSTER_STORE", f"s3://mlpipeline/private-artifacts/{profile.namespace}")
    made = RealCluster(
        word, f"{root.rstrip('/')}/acceptance-{word}", profile.namespace, connected.namespace is not None
    )
    yield made
    _remove(made)


def _remove(made: RealCluster) -> None:
    """Leave nothing behind; what cannot be removed is named."""
    from minicpmv_finetune import storage
    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.gc import delete, find_unused
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    left = []
    for name in made.schedules:
        left += [] if made.command("schedule", "delete", name).code == 0 else [f"schedule {name}"]
    profile = chosen_profile()
    connected = connect(profile)
    experiment = connected.experiment_id(made.experiment)
    runs = {*made.runs, *(str(run.run_id) for run in (connected.runs(experiment) if experiment else ()))}
    for run in runs:
        made.command("cancel", run)
        try:
            connected.call(connected.client.runs.run_service_delete_run, run)
        except Exception as error:
            left.append(f"run {run} ({error})")
        made.kubectl("delete", "workflows.argoproj.io", "-l", f"pipeline/runid={run}", "--ignore-not-found")
    if experiment:
        connected.call(connected.client.experiments.experiment_service_delete_experiment, experiment)
    if profile.mlflow:
        _remove_from_mlflow(made.experiment, runs, profile.mlflow)
    for folder in find_unused(connected, "", min_age_days=0):
        if any(run in folder.uri for run in runs):
            delete(folder)
    for name in storage.walk(made.store):
        storage.remove_file(storage.join(made.store, name))
    assert not left, f"left behind: {', '.join(left)}"


def _remove_from_mlflow(name: str, runs: set[str], settings: "MLflow") -> None:
    """Remove what the suite's runs have logged, and the registered models whose name begins so."""
    from minicpmv_finetune.kubeflow.forwarding import reachable
    from minicpmv_finetune.tracking.step_runs import mlflow_client

    os.environ.setdefault("MLFLOW_TRACKING_URI", reachable(settings.tracking_uri))
    client = mlflow_client()
    for model in client.search_registered_models(filter_string=f"name LIKE '{name}%'"):
        client.delete_registered_model(model.name)
    if found := client.get_experiment_by_name(settings.experiment):
        for run in runs:
            query = f"tags.`minicpmv.pipeline_run` = '{run}'"
            for tracked in client.search_runs([found.experiment_id], filter_string=query):
                client.delete_run(tracked.info.run_id)


@pytest.fixture(scope="session")
def digits_in_store(cluster: RealCluster, digits: Path, tiny_46: Path) -> dict[str, str]:
    """The digits and a tiny base model in the cluster's store, as inputs of a run."""
    from minicpmv_finetune import storage

    done = cluster.command(
        *("upload", digits / "train.json", digits / "eval.json", "--to", f"{cluster.store}/data", "--output", "json")
    )
    assert done.code == 0, done.err
    train, held_out = done.json["uris"]
    for file in sorted(path for path in tiny_46.rglob("*") if path.is_file()):
        storage.upload_file(file, f"{cluster.store}/base/{file.relative_to(tiny_46).as_posix()}")
    return {"data_uri": train, "eval_data_uri": held_out, "base_model_uri": f"{cluster.store}/base"}


@pytest.fixture(scope="session")
def trained(cluster: RealCluster, digits_in_store: dict[str, str]) -> str:
    """The id of a run that went through; other tests look at it."""
    done = cluster.submit("trained", {**digits_in_store, **SMALL})
    assert done.code == 0, done.out + done.err
    return cluster.runs[-1]


@pytest.fixture
def changed_profile(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the caller's profile with some fields changed."""
    from minicpmv_finetune.kubeflow.profile import chosen_profile

    def write(**change: Any) -> Path:
        content = json.loads(chosen_profile().model_dump_json(exclude_none=True)) | change
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
