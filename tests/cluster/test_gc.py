"""`gc` with a real object store and a real MLflow registry."""

import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient

from minicpmv_finetune import storage
from tests.cluster.commands import INPUTS, Command
from tests.cluster.fake_kubeflow import FakeKubeflow

DELETED_RUN = str(uuid.UUID(int=1))


@pytest.fixture
def root(s3_uri: str, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline root in an empty bucket, and an MLflow registry without models."""
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"{s3_uri}/pipelines"


@pytest.fixture
def unused(kubeflow: FakeKubeflow, command: Command, root: str) -> Callable[..., list[str]]:
    """A function that returns the names of the folders that `gc` lists."""

    def names(*words: str) -> list[str]:
        done = command("gc", "--root", root, "--min-age-days", "0", "--output", "json", *words)
        assert done.code == 0, done.err
        return [item["uri"].removeprefix(f"{root}/minicpmv-finetune/") for item in done.json]

    return names


def _write(root: str, *names: str, content: bytes = b"x") -> None:
    for name in names:
        storage.write_bytes(f"{root}/minicpmv-finetune/{name}", content)


def test_only_folders_without_references_are_listed(
    unused: Callable[..., list[str]], command: Command, kubeflow: FakeKubeflow, root: str
) -> None:
    succeeded = command("submit", *INPUTS, "--wait", "--poll", "0", "--output", "json").json["run_id"]
    running = command("submit", *INPUTS, "--output", "json").json["run_id"]
    place = f"{root}/minicpmv-finetune/shards-cache/used"
    _write(root, f"{running}/preprocess/shards/manifest.json", content=json.dumps({"location": place}).encode())
    _write(
        root, "shards-cache/used/train-0.parquet", "shards-cache/unused/train-0.parquet", "shards-cache/unused/a.json"
    )
    _write(root, f"{succeeded}/merge/model/config.json", f"{succeeded}/train/checkpoints/checkpoint-1.json")
    _write(root, f"{running}/train/checkpoints/checkpoint-1.json", f"{DELETED_RUN}/merge/model/config.json")
    _write(root, "notes/readme.txt")
    assert sorted(unused()) == sorted([DELETED_RUN, f"{succeeded}/train/checkpoints", "shards-cache/unused"])


@pytest.mark.parametrize("pipeline", ["minicpmv-finetune", "minicpmv-retrain"])
def test_both_pipelines_are_cleaned_up(pipeline: str, kubeflow: FakeKubeflow, command: Command, root: str) -> None:
    storage.write_bytes(f"{root}/{pipeline}/{DELETED_RUN}/merge/model/config.json", b"x")
    done = command("gc", "--root", root, "--min-age-days", "0", "--delete", "--output", "json")
    assert [item["uri"] for item in done.json] == [f"{root}/{pipeline}/{DELETED_RUN}"]
    assert storage.walk(root) == {}


def test_shards_that_both_pipelines_share_are_kept_while_a_run_of_either_uses_them(
    kubeflow: FakeKubeflow, command: Command, root: str
) -> None:
    run_id = command("submit", *INPUTS, "--output", "json").json["run_id"]
    shared = f"{root}/minicpmv-shards"
    manifest = json.dumps({"location": f"{shared}/used"}).encode()
    storage.write_bytes(f"{root}/minicpmv-retrain/{run_id}/preprocess/shards/manifest.json", manifest)
    for key in ("used", "unused"):
        storage.write_bytes(f"{shared}/{key}/train-0.parquet", b"x")
    done = command("gc", "--root", root, "--min-age-days", "0", "--delete", "--output", "json")
    assert [item["uri"] for item in done.json] == [f"{shared}/unused"]


def test_folders_are_deleted_only_with_the_option_delete(unused: Callable[..., list[str]], root: str) -> None:
    _write(root, f"{DELETED_RUN}/merge/model/config.json", f"{DELETED_RUN}/merge/model/model.safetensors")
    assert unused() == [DELETED_RUN]
    assert unused() == [DELETED_RUN]
    assert unused("--delete") == [DELETED_RUN]
    assert unused() == []
    assert storage.walk(root) == {}


def test_the_folder_of_a_registered_model_is_kept(unused: Callable[..., list[str]], root: str) -> None:
    _write(root, f"{DELETED_RUN}/merge/model/config.json")
    client = MlflowClient()
    client.create_registered_model("receipts")
    client.create_model_version("receipts", source=f"{root}/minicpmv-finetune/{DELETED_RUN}/merge/model")
    assert unused("--delete") == []
    assert storage.read_bytes(f"{root}/minicpmv-finetune/{DELETED_RUN}/merge/model/config.json") == b"x"


def test_without_mlflow_the_folders_of_runs_that_registered_a_model_are_kept(
    kubeflow: FakeKubeflow,
    command: Command,
    root: str,
    profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    runs = {str(uuid.UUID(int=number)): number for number in (1, 2, 3, 4)}
    results = {2: "not registered", 3: "promoted"}
    for run, number in runs.items():
        _write(root, f"{run}/merge/model/config.json", *([f"{run}/register/x/registration"] if number > 1 else []))
        if number in results:
            outcome = json.dumps({"result": results[number], "sentence": "x"}).encode()
            _write(root, f"{run}/outcome.json", content=outcome)
    done = command(
        *("gc", "--root", root, "--min-age-days", "0", "--output", "json", "--profile", profile(mlflow=None))
    )
    listed = [item["uri"].rpartition("/")[2] for item in done.json]
    assert [runs[run] for run in listed] == [1, 2]
    assert "2 folders are kept, because their runs registered a model; name MLflow" in done.err


def test_a_registered_model_is_kept_whichever_scheme_names_its_store(
    kubeflow: FakeKubeflow, command: Command, root: str
) -> None:
    """Kubeflow writes `minio://` for a store that the registry knows as `s3://`."""
    _write(root, f"{DELETED_RUN}/merge/model/config.json")
    client = MlflowClient()
    client.create_registered_model("receipts")
    client.create_model_version("receipts", source=f"{root}/minicpmv-finetune/{DELETED_RUN}/merge/model")
    minio_root = root.replace("s3://", "minio://")
    done = command("gc", "--root", minio_root, "--min-age-days", "0", "--delete", "--output", "json")
    assert done.json == []
    assert storage.walk(root)


def test_a_recently_written_folder_is_kept(kubeflow: FakeKubeflow, command: Command, root: str) -> None:
    _write(root, f"{DELETED_RUN}/merge/model/config.json")
    assert command("gc", "--root", root, "--output", "json").json == []


def test_nothing_is_unused_where_mlflow_does_not_answer(
    kubeflow: FakeKubeflow, command: Command, root: str, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(root, f"{DELETED_RUN}/merge/model/config.json")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", unreachable)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = command("gc", "--root", root, "--min-age-days", "0", "--delete")
    assert done.code == 75
    assert "the model registry does not answer" in done.err
    assert storage.walk(root)


def test_nothing_is_unused_where_kubeflow_does_not_answer(kubeflow: FakeKubeflow, command: Command, root: str) -> None:
    _write(root, f"{DELETED_RUN}/merge/model/config.json")
    kubeflow.answer_next(r"GET .*/runs", 503)
    assert command("gc", "--root", root, "--min-age-days", "0", "--delete").code == 75
    assert storage.walk(root)


def test_without_a_pipeline_root_the_option_root_is_required(
    kubeflow: FakeKubeflow, command: Command, profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "none")
    done = command("gc", "--profile", profile(pipeline_root=""))
    assert done.code == 2
    assert "--root" in done.err


def test_checkpoints_are_kept_until_their_training_is_finished_or_abandoned(
    command: Command, kubeflow: FakeKubeflow, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed() -> list[str]:
        done = command("gc", "--root", root, "--min-age-days", "0", "--output", "json")
        return [item["uri"].removeprefix(f"{root}/minicpmv-checkpoints/") for item in done.json]

    names = ("running/lease.json", "running/checkpoint-1.json", "stopped/checkpoint-1.json")
    finished = ("finished/checkpoint-1.json", "finished/finished.json", "again/finished.json", "again/lease.json")
    for name in (*names, *finished):
        storage.write_bytes(f"{root}/minicpmv-checkpoints/{name}", b"{}")
    assert listed() == ["finished"]
    monkeypatch.setattr("minicpmv_finetune.kubeflow.gc._ABANDONED_AGE", timedelta(0))
    assert listed() == ["finished", "stopped"]
