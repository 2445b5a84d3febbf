"""Several nodes: a TrainJob is created, followed, found again and deleted; and what its pods run."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kfp import dsl
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from minicpmv_finetune import storage
from minicpmv_finetune.components.train import trainjob_pod
from minicpmv_finetune.components.train.arguments import pop_num_nodes
from minicpmv_finetune.components.train.checkpoints import Seal
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.train.flags import take_processes
from minicpmv_finetune.components.train.launch import CrashExit
from minicpmv_finetune.components.train.trainjob import _start, build_job, job_name, train_on_nodes, uses_nodes
from minicpmv_finetune.components.train.trainjob_cluster import Cluster
from minicpmv_finetune.components.train.trainjob_heartbeat import ABANDONED, LifeWatch, heartbeat_uri, sign_of_life
from minicpmv_finetune.components.train.trainjob_pod import run_node
from minicpmv_finetune.components.train.trainjob_waiting import container_status, restarts, waiting_reasons
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.reports.training_record import RECORD_FILE, TrainingRecord, read_record
from tests.cluster.fake_kubernetes import FakeKubernetes, Record, serving, unknown_fields
from tests.example_record import example_record
from tests.warm_processes import WarmCommand

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RECORD = example_record()
RECORDINGS = Path(__file__).parents[2] / "cluster" / "recordings" / "objects"
SECRET = {"secretKeyRef": {"name": "minicpmv-s3", "key": "AWS_SECRET_ACCESS_KEY"}}
STEP_POD: Record = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "step",
        "uid": "1",
        "labels": {"kueue.x-k8s.io/queue-name": "gpus"},
        "ownerReferences": [
            {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "7", "controller": True}
        ],
    },
    "spec": {
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry/trainer@sha256:1",
                "env": [
                    {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "id"}}},
                    {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": SECRET},
                    {
                        "name": "KFP_RUN_ID",
                        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pipeline/runid']"}},
                    },
                    {"name": "UNRELATED", "valueFrom": SECRET},
                ],
            },
        ]
    },
    "status": {"phase": "Running"},
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    with serving(tmp_path) as (state, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("KFP_POD_NAME", "step")
        monkeypatch.setenv("KFP_RUN_ID", "run-1")
        state.pods["step"] = STEP_POD
        yield state


@pytest.fixture
def result(s3_uri: str) -> str:
    """Folder in the store where the nodes have written a result."""
    storage.write_bytes(f"{s3_uri}/adapter/{RECORD_FILE}", RECORD.model_dump_json().encode())
    storage.write_bytes(f"{s3_uri}/adapter/adapter_model.safetensors", b"weights")
    return f"{s3_uri}/adapter"


def _train(output_uri: str, out: Path) -> None:
    train_on_nodes(["--lora_r", "4"], 2, output_uri, out, interval=0.01)


def _job(**more: Any) -> Record:
    arguments: dict[str, Any] = {"name": "train-1", "nodes": 2, "output_uri": "s3://b/o", "flags": []}
    return build_job(**{**arguments, "pod": STEP_POD, "variables": {}, **more})


def test_the_job_has_only_fields_of_the_published_schema() -> None:
    job = _job(flags=["--lora_r", "4"], variables={"KFP_RUN_ID": "run-1", "AWS_REGION": "x"})
    assert not unknown_fields(job)
    # The comparison finds a field of another release.
    assert unknown_fields({**job, "spec": {**job["spec"], "podTemplateOverrides": [{"x": 1}]}})
    assert job["spec"]["trainer"]["image"] == "registry/trainer@sha256:1"
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert job["spec"]["trainer"]["args"] == ["s3://b/o", "--lora_r", "4"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    # The workflow is the owner, but not the controller: only its deletion affects the job.
    (owner,) = job["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "7"}


def test_the_flag_decides_the_processes_a_node() -> None:
    trainer = _job(flags=["--nproc_per_node", "2", "--lora_r", "4"])["spec"]["trainer"]
    assert (trainer["numProcPerNode"], trainer["args"]) == (2, ["s3://b/o", "--lora_r", "4"])
    assert "numProcPerNode" not in _job(flags=["--lora_r", "4"])["spec"]["trainer"]
    assert not unknown_fields(_job(flags=["--nproc_per_node", "2"]))
    for wrong in (["0"], ["two"], []):
        with pytest.raises(UserError, match="nproc_per_node is"):
            take_processes(["--nproc_per_node", *wrong])


def test_credentials_are_forwarded_only_by_reference(capsys: pytest.CaptureFixture[str]) -> None:
    variables = {
        "AWS_ACCESS_KEY_ID": "the-id",
        "AWS_SECRET_ACCESS_KEY": "hidden-1",
        "AWS_SESSION_TOKEN": "hidden-2",
        "MLFLOW_TRACKING_PASSWORD": "hidden-3",
        "MLFLOW_TRACKING_URI": "http://me:hidden-4@mlflow:5000",
        "MLFLOW_EXPERIMENT_NAME": "digits",
        "MLFLOW_RUN_ID": "opened-by-kubeflow",
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "KFP_RUN_ID": "run-1",
        "HF_TOKEN": "hidden-5",
        "PATH": "/bin",
        "HF_ENDPOINT": "https://hub.example.com",
        "HF_HOME": "/scratch/huggingface",
        "HTTPS_PROXY": "http://proxy:3128",
        "no_proxy": ".svc",
        "SSL_CERT_FILE": "/etc/minicpmv-ca/ca.crt",
        "MINICPMV_FINETUNE_ALLOWED_URIS": "s3://datasets/",
    }
    job = _job(variables=variables)
    env = {entry.pop("name"): entry for entry in job["spec"]["trainer"]["env"]}
    assert env == {
        "AWS_ACCESS_KEY_ID": {"valueFrom": {"secretKeyRef": {"name": "s3", "key": "id"}}},
        "AWS_SECRET_ACCESS_KEY": {"valueFrom": SECRET},
        "AWS_ENDPOINT_URL": {"value": "http://s3:9000"},
        "MLFLOW_EXPERIMENT_NAME": {"value": "digits"},
        "MLFLOW_RUN_ID": {"value": "opened-by-kubeflow"},
        "KFP_RUN_ID": {"value": "run-1"},
        "HF_ENDPOINT": {"value": "https://hub.example.com"},
        "HTTPS_PROXY": {"value": "http://proxy:3128"},
        "no_proxy": {"value": ".svc"},
        "SSL_CERT_FILE": {"value": "/etc/minicpmv-ca/ca.crt"},
        "MINICPMV_FINETUNE_ALLOWED_URIS": {"value": "s3://datasets/"},
    }
    log = capsys.readouterr().err
    assert "hidden" not in json.dumps(job) + log
    for name in ("AWS_SESSION_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
        assert f"{name} is not forwarded to the nodes" in log


def test_one_node_is_used_where_the_pod_has_no_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINICPMV_FINETUNE_TRAIN_ON_NODES", raising=False)
    assert (uses_nodes(1), uses_nodes(2)) == (False, True)
    monkeypatch.setenv("MINICPMV_FINETUNE_TRAIN_ON_NODES", "true")
    assert uses_nodes(1)


def test_kubernetes_replaces_nothing_in_arguments() -> None:
    # In Kubernetes `$(…)` names a variable, and `$$` means a dollar.
    job = _job(flags=["--lora_target_modules", r"(q|k)$|$(HOME)"])
    assert job["spec"]["trainer"]["args"][-1] == r"(q|k)$$|$$(HOME)"


def test_each_task_of_each_run_has_its_own_name() -> None:
    name = job_name("run-1", "s3://b/1/adapter")
    assert name == job_name("run-1", "s3://b/1/adapter")
    assert len({name, job_name("run-2", "s3://b/1/adapter"), job_name("run-1", "s3://b/2/adapter")}) == 3
    # Trainer's rule for the name, and Kubernetes' for the names of pods that contain it.
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-999-abcde") <= 63


@pytest.mark.parametrize("wanted", [0, -1, 1.5, "two", True])
def test_an_invalid_number_of_nodes_is_refused(wanted: object) -> None:
    with pytest.raises(UserError, match="num_nodes is"):
        pop_num_nodes({"num_nodes": wanted})


def test_the_number_of_nodes_is_not_passed_to_the_script() -> None:
    flags = {"num_nodes": 2.0, "lora_r": 4}  # Kubeflow converts the numbers of a JSON object to floats
    assert pop_num_nodes(flags) == 2
    assert flags == {"lora_r": 4}
    assert pop_num_nodes(flags) == 1


def test_a_job_is_created_followed_and_its_result_fetched(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[None]:
        yield  # the query before the job is created
        first, second = cluster.add_pod(0), cluster.add_pod(1)
        yield
        cluster.run(second, "line of the second node")
        cluster.run(first, "loss 2.0")
        yield
        cluster.logs[first["metadata"]["name"]].write("loss 1.0")
        yield
        for pod in (first, second):
            cluster.end(pod)
        cluster.conclude("Complete")
        yield

    cluster.events = events()
    _train(result, tmp_path / "adapter")
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["loss 2.0", "loss 1.0"]
    assert "2 of 2 nodes run" in shown.err
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert read_record(tmp_path / "adapter") == RECORD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "kubeconfig"]
    assert not cluster.deleted


def test_a_log_whose_connection_breaks_is_printed_once(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[None]:
        yield
        first = cluster.add_pod(0)
        cluster.logs[first["metadata"]["name"]].cut_after = 2
        cluster.run(first, "one", "two", "three")
        yield
        yield
        cluster.logs[first["metadata"]["name"]].write("four")
        cluster.end(first)
        cluster.conclude("Complete")
        yield

    cluster.events = events()
    _train(result, tmp_path / "adapter")
    assert capsys.readouterr().out.splitlines() == ["one", "two", "three", "four"]


@contextmanager
def _following(result: str, out: Path) -> Iterator["subprocess.Popen[str]"]:
    """A step in a process of its own, whose TrainJob waits for nodes."""
    code = (
        "import sys; from pathlib import Path\n"
        "from minicpmv_finetune.errors import RetryableError, end_process\n"
        "from minicpmv_finetune.components.train.trainjob import train_on_nodes\n"
        "try: train_on_nodes([], 2, sys.argv[1], Path(sys.argv[2]))\n"
        "except RetryableError as error: end_process(error)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, result, str(out)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("0 of 2 nodes run" in line for line in process.stderr)
        yield process


def test_sigterm_deletes_the_job(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    with _following(result, tmp_path / "adapter") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 75
    assert re.search("TrainJob train-.* is deleted; running the step again continues from the newest checkpoint", log)
    assert cluster.deleted == ["Background"]
    assert not (tmp_path / "adapter").exists()


def test_a_retry_follows_the_job_of_a_killed_pod(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _following(result, tmp_path / "adapter") as process:
        process.kill()
    cluster.conclude("Complete")
    _train(result, tmp_path / "adapter")
    assert "of an earlier attempt exists; this attempt follows it" in capsys.readouterr().err
    assert len(cluster.created) == 1
    assert not cluster.deleted


def test_a_job_that_cannot_be_followed_is_not_created(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    cluster.faults = [("GET .*/pods$", 403)]
    with pytest.raises(UserError, match=r"may not list pods in team .*; grant it this right"):
        _train(result, tmp_path / "adapter")
    assert not cluster.created


@pytest.mark.parametrize("may_get_jobsets", [True, False])
def test_nodes_of_a_deleted_job_end_before_another_is_created(
    may_get_jobsets: bool,
    cluster: FakeKubernetes,
    result: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pods and JobSet outlive a TrainJob; a new one of the same name would take over the old JobSet and its state."""
    name = job_name("run-1", result)

    def events() -> Iterator[None]:
        yield
        yield
        assert not cluster.created
        del cluster.pods["old"]
        if may_get_jobsets:
            yield
            assert not cluster.created
            del cluster.jobsets[name]
        else:
            cluster.faults = [("GET .*/jobsets/", 403)]
        yield

    cluster.events = events()
    cluster.pods["old"] = _node_pod(name, 0) | {"status": {"phase": "Running"}}
    cluster.jobsets[name] = _recorded("trainjob-jobset")
    cluster.on_create = lambda job: cluster.conclude("Complete")
    _train(result, tmp_path / "adapter")
    assert capsys.readouterr().err.count("have not ended yet; this attempt waits for them") == 1


def test_a_job_that_failed_before_is_replaced(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    def events() -> Iterator[None]:
        yield
        cluster.conclude("Failed", "the node was taken away")
        yield

    cluster.events = events()
    with pytest.raises(RetryableError, match=r"failed \(the node was taken away\); running the step again continues"):
        _train(result, tmp_path / "adapter")
    cluster.on_create = lambda job: cluster.conclude("Complete")
    _train(result, tmp_path / "adapter")
    assert cluster.deleted == ["Background"]
    assert [job["metadata"]["name"] for job in cluster.created] == [job_name("run-1", result)] * 2


def test_a_mistake_on_any_node_ends_the_job_at_once(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    def events() -> Iterator[None]:
        yield
        first, second = cluster.add_pod(0), cluster.add_pod(1)
        cluster.run(first, "waiting for the others")
        cluster.end(second, 2, "s3://shards: prepared for another model.")
        yield

    cluster.events = events()
    with pytest.raises(UserError, match="prepared for another model"):
        _train(result, tmp_path / "adapter")
    assert cluster.deleted == ["Background"]
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [(75, "The store does not answer.", RetryableError), (137, "", RetryableError), (1, "", SystemExit)],
)
def test_a_job_fails_as_its_nodes_did(
    code: int,
    message: str,
    expected: type[BaseException],
    cluster: FakeKubernetes,
    result: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def events() -> Iterator[None]:
        yield
        first = cluster.add_pod(0)
        cluster.run(first, "Traceback")
        cluster.end(first, code, message)
        cluster.conclude("Failed", "jobset failed")
        yield

    cluster.events = events()
    with pytest.raises(expected) as raised:
        _train(result, tmp_path / "adapter")
    assert message in str(raised.value)
    if expected is SystemExit:
        assert raised.value.code == code  # type: ignore[attr-defined]
    assert "Traceback" in capsys.readouterr().out


def test_a_job_that_somebody_else_deletes_is_reported(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    cluster.events = iter(lambda: cluster.jobs.clear(), 1)
    with pytest.raises(RetryableError, match="deleted by somebody else"):
        _train(result, tmp_path / "adapter")


def test_a_short_outage_of_kubernetes_is_survived(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    def events() -> Iterator[None]:
        yield
        cluster.faults = [("GET .*/pods$", 503), ("GET .*/trainjobs/", 500)]
        yield
        cluster.conclude("Complete")
        yield

    cluster.events = events()
    _train(result, tmp_path / "adapter")
    assert not cluster.faults


def test_a_field_that_the_cluster_does_not_have_is_reported(
    cluster: FakeKubernetes, result: str, tmp_path: Path
) -> None:
    cluster.unsupported = (".spec.trainer.numNodes",)
    # By default Kubernetes drops an unknown field, and only one node would train.
    cluster.on_create = lambda job: cluster.conclude("Complete")
    with pytest.raises(UserError, match=r"refuses to create trainjobs: strict decoding error: .*numNodes=2"):
        _train(result, tmp_path / "adapter")


def test_a_cluster_that_lacks_something_is_explained(
    cluster: FakeKubernetes, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.versions = []
    with pytest.raises(UserError, match=r"does not serve trainer.kubeflow.org; install Kubeflow Trainer"):
        _train(result, tmp_path / "adapter")
    cluster.versions = ["v1"]
    with pytest.raises(UserError, match=r"serves trainer.kubeflow.org as v1; install"):
        _train(result, tmp_path / "adapter")
    cluster.versions = ["v1alpha1"]
    cluster.faults = [("POST", 403)]
    with pytest.raises(UserError, match="may not create trainjobs in team"):
        _train(result, tmp_path / "adapter")
    cluster.faults = [("POST", 422)]  # the answer of Trainer's webhook if there is no such runtime
    with pytest.raises(UserError, match="refuses to create trainjobs: by the test"):
        _train(result, tmp_path / "adapter")
    monkeypatch.setenv("KFP_POD_NAME", "nowhere")
    with pytest.raises(UserError, match="there is no pod nowhere in team"):
        _train(result, tmp_path / "adapter")
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(UserError, match="no access to Kubernetes"):
        _train(result, tmp_path / "adapter")
    with pytest.raises(UserError, match="artifacts in /artifacts"):
        _train("/artifacts/adapter", tmp_path / "adapter")
    assert not cluster.jobs


def test_the_step_creates_a_job_for_several_nodes(
    cluster: FakeKubernetes, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kubeflow mounts nothing here: its launcher copies artifacts of s3://bucket to /s3/bucket.
    monkeypatch.setattr("kfp.dsl.types.artifact_types._S3_LOCAL_MOUNT_PREFIX", f"{tmp_path}/s3/")
    storage.write_bytes(f"{result}/training.html", b"curves")
    cluster.on_create = lambda job: cluster.conclude("Complete")
    root = storage.parent(result)
    adapter = dsl.Model(uri=result)
    settings = {"use_lora": True, "tune_vision": True, "tune_llm": False, "lora_r": 4, "lora_alpha": 8, "seed": 1}
    step: Any = train
    step.python_func(
        **settings,
        **{"learning_rate": 1e-3, "num_train_epochs": 1.0, "per_device_train_batch_size": 4},
        base_model_uri="s3://models/base",
        shards=dsl.Dataset(uri=f"{root}/shards"),
        training_flags={"num_nodes": 3.0, "logging_steps": 5.0},
        adapter=adapter,
        training_metrics=dsl.Metrics(),
        **{name: SimpleNamespace(path=str(tmp_path / name)) for name in ("training_summary", "training_report")},
    )
    trainer = cluster.job["spec"]["trainer"]
    flags = dict(zip(trainer["args"][1::2], trainer["args"][2::2], strict=True))
    assert trainer["numNodes"] == 3
    assert trainer["args"][0] == result
    # URIs that are valid on every node.
    assert flags["--data_path"] == f"{root}/shards"
    assert flags["--checkpoint_uri"] == f"{root}/checkpoints"
    assert flags["--logging_steps"] == "5"
    assert not {"--num_nodes", "--output_dir"} & set(flags)
    assert adapter.metadata["generation"] == "4.6"
    assert (tmp_path / "training_report").read_bytes() == b"curves"
    assert read_record(Path(adapter.path)) == RECORD


def test_a_node_writes_its_error_to_the_termination_message(tmp_path: Path) -> None:
    message = tmp_path / "termination-log"
    with pytest.raises(SystemExit) as raised:
        run_node("s3://bucket/adapter", ["--data_path", str(tmp_path), "--no_such_flag", "1"], message)
    assert raised.value.code == 2
    assert message.read_text() == "--no_such_flag: no such flag; see `minicpmv-finetune train --help`."


def test_two_nodes_train_and_resume_from_the_store(
    cluster: FakeKubernetes,
    tiny_46: Path,
    shards: Path,
    s3_uri: str,
    s3_client: "S3Client",
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Here each pod is a real process, with its own folder as disk and only the variables of the TrainJob."""
    for path in shards.iterdir():
        if path.is_file():
            storage.upload_file(path, f"{s3_uri}/shards/{path.name}")
    cluster.on_create = lambda job: _run_pods(cluster, job, tmp_path)
    flags = (
        f"--data_path {s3_uri}/shards --model_name_or_path {tiny_46} --checkpoint_uri {s3_uri}/checkpoints "
        "--use_lora true --tune_llm false --lora_r 4 --learning_rate 1e-3 --per_device_train_batch_size 4 "
        "--max_steps 4 --save_strategy steps --save_steps 2 --logging_steps 1"
    ).split()
    train_on_nodes(flags, 2, f"{s3_uri}/adapter", tmp_path / "adapter", interval=0.5)
    record = read_record(tmp_path / "adapter")
    assert [entry["step"] for entry in record.history if "loss" in entry] == [1, 2, 3, 4]
    assert "are trained on 64 samples" in capfd.readouterr().out

    # Each process writes its random state on its own node's disk; the checkpoint contains both.
    seal = Seal.model_validate_json(storage.read_bytes(f"{s3_uri}/checkpoints/checkpoint-4.json"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(seal.files)
    assert seal.world_size == 2

    # As if the nodes had been lost after the second step: new pods with empty disks continue from there.
    storage.remove_file(f"{s3_uri}/checkpoints/checkpoint-4.json")
    storage.remove_file(f"{s3_uri}/adapter/{RECORD_FILE}")
    cluster.jobs.clear()
    cluster.pods = {"step": cluster.pods["step"]}
    train_on_nodes(flags, 2, f"{s3_uri}/adapter", tmp_path / "again", interval=0.5)
    assert "continuing from checkpoint-2" in capfd.readouterr().out
    assert _losses(read_record(tmp_path / "again")) == _losses(record)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "adapter" / weights).read_bytes()


def _losses(record: TrainingRecord) -> list[float]:
    return [entry["loss"] for entry in record.history if "loss" in entry]


def _run_pods(cluster: FakeKubernetes, job: Record, folder: Path) -> None:
    """Do what Trainer's torch runtime and the kubelet do, with processes instead of containers."""
    trainer = job["spec"]["trainer"]
    secrets = {"id": os.environ["AWS_ACCESS_KEY_ID"], "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"]}
    variables = {
        entry["name"]: entry.get("value", "").replace("$$", "$") or secrets[entry["valueFrom"]["secretKeyRef"]["key"]]
        for entry in trainer["env"]
    }
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    port = _free_port()
    running = []
    for rank in range(trainer["numNodes"]):
        disk = Path(tempfile.mkdtemp(prefix="disk-", dir=folder))
        rendezvous = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": str(rank)}
        rendezvous |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        _, of_module, module = trainer["command"]
        assert of_module == "-m"
        process = WarmCommand(
            module,
            [word.replace("$$", "$") for word in trainer["args"]],
            {**kept, **variables, **rendezvous, "TMPDIR": str(disk), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        pod = cluster.add_pod(rank)
        cluster.run(pod)
        running.append((pod, process))
    threads = [
        threading.Thread(target=_copy_log, args=(cluster, pod, process), daemon=True) for pod, process in running
    ]
    threading.Thread(target=_conclude, args=(cluster, threads, [process for _, process in running])).start()


def _copy_log(cluster: FakeKubernetes, pod: Record, process: WarmCommand) -> None:
    with process:
        for line in process.stdout:
            cluster.logs[pod["metadata"]["name"]].write(line.rstrip("\n"))
    cluster.end(pod, process.wait())


def _conclude(cluster: FakeKubernetes, watchers: Sequence[threading.Thread], processes: Sequence[WarmCommand]) -> None:
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    cluster.conclude("Failed" if any(process.returncode for process in processes) else "Complete")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text())


def test_a_recorded_job_is_found_again_by_its_name(cluster: FakeKubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    job, pods = _recorded("trainjob-trainjob"), _recorded("trainjob-pods")
    name = job_name(job["metadata"]["labels"]["pipeline/runid"], job["spec"]["trainer"]["args"][0])
    assert name == job["metadata"]["name"]
    cluster.jobs[name] = job
    cluster.pods |= {pod["metadata"]["name"]: pod for pod in pods}
    found = Cluster()
    _start(found, name, _job(name=name), 0.01)
    assert "of an earlier attempt exists; this attempt follows it" in capsys.readouterr().err
    assert not cluster.created
    nodes = found.pods(name)
    assert {pod.metadata.name for pod in nodes} == {pod["metadata"]["name"] for pod in pods}
    assert restarts(nodes) == 0
    ended = [status.state.terminated for status in map(container_status, nodes) if status and status.state]
    assert [state.exit_code for state in ended if state] == [0, 0]
    cluster.jobsets[name] = _recorded("trainjob-jobset")
    assert found.most_restarts(name) == 10


def test_recorded_pods_say_why_they_wait(cluster: FakeKubernetes) -> None:
    # The recorded pods are those of steps; a node's pod waits with the same words.
    for number, pod in enumerate(_recorded("pods-waiting")):
        if pod["phase"] == "Pending":
            containers = [
                {**_STATUS, "name": "node", "state": one["state"]} for one in pod["containers"] if one["name"] == "main"
            ]
            made = _node_pod("train-1", number)
            made["status"] = {"phase": "Pending", "conditions": pod["conditions"], "containerStatuses": containers}
            cluster.pods[pod["name"]] = made
    scheduling, secret, image = map(str, waiting_reasons(Cluster().pods("train-1"), []))
    assert scheduling.startswith("a node waits for a machine (0/1 nodes are available: 1 Insufficient nvidia.com/gpu")
    assert secret == 'a node waits because its container cannot be created (secret "not-there" not found)'
    assert image.startswith("a node waits because its image cannot be pulled (Back-off pulling image")


_STATUS: Record = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}


def _node_pod(job: str, index: int, attempt: int = 0) -> Record:
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "jobset.sigs.k8s.io/restart-attempt": str(attempt),
    }
    name = f"{job}-{index}-{attempt}"
    return {"metadata": {"name": name, "uid": name, "labels": labels}, "spec": {"containers": [{"name": "node"}]}}


# The sentences after "403" are those of Kubernetes and Trainer; that a webhook answers so is recorded (fact 18).
@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (
            403,
            'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.RuntimeRef: Invalid '
            'value: {}: TrainingRuntime.trainer.kubeflow.org "minicpmv-finetune" not found: specified trainingRuntime '
            "must be created before the TrainJob is created",
            "team has no TrainingRuntime minicpmv-finetune .*apply it, see k8s/README.md",
        ),
        (403, 'trainjobs "t" is forbidden: exceeded quota: gpus, requested: count/x=1', "the quota gpus of team"),
        (403, 'pods "t" is forbidden: violates PodSecurity "restricted:latest": hostPath', "Pod Security of team"),
        (403, 'admission webhook "policy.example.com" denied the request: label owner', "webhook policy.example.com"),
        (403, "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no", "a policy of the cluster refuses"),
        (
            403,
            'trainjobs.trainer.kubeflow.org is forbidden: User "s" cannot create resource "trainjobs" in API group',
            "service account may not create trainjobs in team .*grant it this right",
        ),
        (
            500,
            'Internal error occurred: failed calling webhook "v.trainer": no endpoints',
            "webhook v.trainer.*controller",
        ),
    ],
)
def test_each_refusal_has_a_sentence_of_its_own(
    status: int, message: str, expected: str, cluster: FakeKubernetes, result: str, tmp_path: Path
) -> None:
    cluster.faults = [("POST", status, message)]
    with pytest.raises(RetryableError if status == 500 else UserError, match=expected):
        _train(result, tmp_path / "adapter")


def test_pods_that_kubernetes_refuses_are_explained(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[None]:
        yield
        # The pod that was not created has a new name each time.
        for name in ("n-0-0-mj5bg", "n-0-0-s8mkv", "n-0-0-5mnc4"):
            cluster.refusals.append(f'Error creating: pods "{name}" is forbidden: exceeded quota: gpus')
            yield
        cluster.refusals = ['Error creating: pods "t" is forbidden: violates PodSecurity "restricted:latest": x']
        yield

    cluster.events = events()
    with pytest.raises(UserError, match=r"Pod Security refuses the nodes \(violates PodSecurity .*TrainingRuntime"):
        _train(result, tmp_path / "adapter")
    said = capsys.readouterr().err
    assert said.count("0 of 2 nodes run; Kubernetes refuses to create the nodes' pods (exceeded quota: gpus)") == 1
    assert cluster.deleted == ["Background"]


def test_a_state_is_said_once_though_its_words_change(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[None]:
        yield
        yield
        pod = cluster.add_pod(0)
        cluster.warnings = ["Failed to create pod sandbox: failed to find plugin"]
        yield
        for reason in ("ErrImagePull", "ImagePullBackOff", "ErrImagePull"):
            waiting = {"reason": reason, "message": f"{reason} of a node"}
            pod["status"]["containerStatuses"] = [{**_STATUS, "name": "node", "state": {"waiting": waiting}}]
            yield
            yield
        cluster.conclude("Complete")
        yield

    cluster.events = events()
    _train(result, tmp_path / "adapter")
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines() if "0 of 2 nodes run" in line]
    assert said == [
        "0 of 2 nodes run",
        "0 of 2 nodes run; a node is not started yet (Failed to create pod sandbox: failed to find plugin)",
        "0 of 2 nodes run; a node waits because its image cannot be pulled (ErrImagePull of a node)",
    ]


def test_restarts_are_counted(
    cluster: FakeKubernetes, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def events() -> Iterator[None]:
        yield
        name = cluster.job["metadata"]["name"]
        cluster.jobsets[name] = _recorded("trainjob-jobset")
        cluster.pods["n"] = _node_pod(name, 0, attempt=3) | {"status": {"phase": "Running"}}
        yield
        cluster.conclude("Complete")
        yield

    cluster.events = events()
    _train(result, tmp_path / "adapter")
    assert "1 of 2 nodes run, restart 3 of 10" in capsys.readouterr().err


def test_the_steps_timeout_is_the_jobs_deadline(cluster: FakeKubernetes, result: str, tmp_path: Path) -> None:
    pod = {**STEP_POD, "spec": {**STEP_POD["spec"], "activeDeadlineSeconds": 3600}}
    job = _job(pod=pod)
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    assert not unknown_fields(job)
    # An older release refuses the field; the nodes still end by themselves.
    cluster.pods["step"] = pod
    cluster.unsupported = (".spec.activeDeadlineSeconds",)
    cluster.on_create = lambda job: cluster.conclude("Complete")
    _train(result, tmp_path / "adapter")
    assert "activeDeadlineSeconds" not in cluster.job["spec"]


def test_nodes_end_themselves_when_nobody_follows_them(s3_uri: str) -> None:
    output, ended = f"{s3_uri}/task/adapter", threading.Event()
    watch = LifeWatch(output, patience=0.4, seconds=0.05)
    with watch.watching(ended.set):
        with sign_of_life(output, seconds=0.05):
            assert storage.read_bytes(heartbeat_uri(output))
            assert not ended.wait(1)
        assert ended.wait(5)
    assert watch.is_abandoned


def test_a_store_that_does_not_answer_is_no_sign_of_death(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        raise RetryableError("The store does not answer.")

    ended, watch = threading.Event(), LifeWatch(f"{s3_uri}/adapter", patience=0.1, seconds=0.02)
    with watch.watching(ended.set):
        monkeypatch.setattr(storage, "read_bytes", fail)
        assert not ended.wait(0.5)


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (CrashExit(1, "training process 0 ended with exit code 1."), "exit code 1: training process 0 ended"),
        (RetryableError("Training was stopped by SIGTERM in step 3."), ABANDONED),
    ],
)
def test_what_need_not_be_repeated_ends_with_the_code_of_a_mistake(
    raised: BaseException, sentence: str, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JobSet starts no node again after this code."""

    def launch(flags: Sequence[str]) -> None:
        raise raised

    monkeypatch.setattr(trainjob_pod, "launch", launch)
    monkeypatch.setattr(LifeWatch, "__init__", lambda self, uri: self.__dict__.update(is_abandoned=True, _uri=uri))
    monkeypatch.setattr(LifeWatch, "watching", lambda self: contextlib.nullcontext())
    with pytest.raises(SystemExit) as ended:
        run_node(f"{s3_uri}/adapter", [], tmp_path / "message")
    assert ended.value.code == 2
    assert (tmp_path / "message").read_text().startswith(sentence)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ImportError("no module torchrun"), 2, "exit code 1: ImportError: no module torchrun"),
        (RendezvousConnectionError("the other node is gone"), RendezvousConnectionError, ""),
        (torch.distributed.DistNetworkError("connection reset"), RuntimeError, ""),
        (ConnectionResetError("reset"), OSError, ""),
    ],
)
def test_a_bug_outside_of_the_training_processes_is_not_repeated(
    raised: Exception,
    code: int | type[Exception],
    message: str,
    s3_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launch(flags: Sequence[str]) -> None:
        raise raised

    monkeypatch.setattr(trainjob_pod, "launch", launch)
    with pytest.raises(SystemExit if isinstance(code, int) else code) as ended:
        run_node(f"{s3_uri}/adapter", [], tmp_path / "message")
    assert getattr(ended.value, "code", None) == (code if isinstance(code, int) else None)
    assert (tmp_path / "message").exists() == bool(message)
    if message:
        assert (tmp_path / "message").read_text() == message


@pytest.mark.parametrize(
    ("message", "expected"), [("exit code 1: training process 0 ended.", SystemExit), (ABANDONED, RetryableError)]
)
def test_the_step_ends_as_such_a_node(
    message: str, expected: type[BaseException], cluster: FakeKubernetes, result: str, tmp_path: Path
) -> None:
    def events() -> Iterator[None]:
        yield
        cluster.end(cluster.add_pod(0), 2, message)
        yield

    cluster.events = events()
    with pytest.raises(expected) as ended:
        _train(result, tmp_path / "adapter")
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 1
        assert cluster.deleted == ["Background"]


def test_a_node_that_is_deleted_as_it_starts_ends() -> None:
    """The first process of a container gets no signal that it has no handler for."""
    before = signal.getsignal(signal.SIGTERM)
    with trainjob_pod._ending_on_sigterm(lambda: None):
        with trainjob_pod._without_sigterm():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_node_that_is_deleted_while_it_waits_for_others_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits without Python, whose handler is not called; here it is one that does nothing."""
    stuck, saved = threading.Event(), threading.Event()
    monkeypatch.setattr(trainjob_pod, "_has_children", lambda: not saved.is_set())
    with trainjob_pod._ending_on_sigterm(stuck.set, patience=0.1):
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.raise_signal(signal.SIGTERM)
        assert not stuck.wait(0.3), "training processes may save"
        saved.set()
        assert stuck.wait(10)


def test_a_stuck_node_without_a_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    watch = LifeWatch("s3://bucket/task/adapter")
    trainjob_pod._end_stuck(watch, tmp_path / "message")
    watch.is_abandoned = True
    trainjob_pod._end_stuck(watch, tmp_path / "message")
    assert codes == [143, 2]
    assert (tmp_path / "message").read_text() == ABANDONED


def test_nodes_that_run_out_of_memory_are_not_started_for_ever(
    cluster: FakeKubernetes, result: str, tmp_path: Path
) -> None:
    def events() -> Iterator[None]:
        yield
        name = cluster.job["metadata"]["name"]
        for attempt in range(3):
            pod = _node_pod(name, 0, attempt)
            pod["spec"]["containers"][0]["resources"] = {"limits": {"memory": "4Gi"}}
            state = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
            pod["status"] = {"phase": "Failed", "containerStatuses": [{**_STATUS, "name": "node", "state": state}]}
            cluster.pods = {"step": STEP_POD, "n": pod}
            yield

    cluster.events = events()
    with pytest.raises(UserError, match=r"a node ran out of memory \(limit 4Gi\); give the nodes more"):
        _train(result, tmp_path / "adapter")
