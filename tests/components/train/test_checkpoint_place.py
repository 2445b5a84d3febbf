"""Which folder a training's checkpoints are in, and that two runs of the same content never write to the same one."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicpmv_finetune import environment, storage
from minicpmv_finetune.components.train import checkpoint_place
from minicpmv_finetune.components.train.checkpoint_place import (
    FINISHED_FILE,
    LEASE_FILE,
    Lease,
    checkpoints_of,
    choose_place,
)
from minicpmv_finetune.components.train.checkpoints import Checkpoints


@pytest.fixture(autouse=True)
def run_7(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pipeline run that settles at once, and whose threads end with the test."""
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    monkeypatch.setattr(checkpoint_place, "_SETTLE_SECONDS", 0.0)
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(10)  # the thread of a pool that nobody uses any more is about to end
            assert not thread.is_alive()


@pytest.fixture
def address(s3_uri: str) -> str:
    """The address that the train step gives the training."""
    return f"{s3_uri}/minicpmv-checkpoints/{{digest}}"


def choose(address: str, run: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[str, Lease | None]:
    """The place of a run, as the part of the address that follows the common folder."""
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, run)
    arguments = {"digest": "a1b2", "world_size": 1, "from_beginning": False, **options}
    place, lease = choose_place(address, **arguments)  # type: ignore[arg-type]
    return place.removeprefix(address.removesuffix("{digest}")), lease


@pytest.mark.parametrize("execution", ["725fe2f2", "817db6f5"])
@pytest.mark.parametrize("pipeline", ["minicpmv-finetune", "minicpmv-retrain"])
def test_all_attempts_runs_and_pipelines_share_one_folder(pipeline: str, execution: str) -> None:
    root = "minio://mlpipeline/private-artifacts/kubeflow/v2/artifacts"
    adapter = f"{root}/{pipeline}/run-7/train/{execution}/adapter"
    assert checkpoints_of(adapter) == f"{root}/minicpmv-checkpoints/{{digest}}"


def test_a_run_on_this_machine_keeps_its_checkpoints_in_its_own_folder(tmp_path: Path) -> None:
    assert checkpoints_of(str(tmp_path / "run-7/train/adapter")) == str(tmp_path / "run-7/train/checkpoints")


def test_the_second_run_trains_apart_and_says_so(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, lease = choose(address, "run-7", monkeypatch)
    assert place == "a1b2"
    assert lease
    assert choose(address, "run-7", monkeypatch)[0] == "a1b2", "a run does not wait for its own dead attempt"
    place, own = choose(address, "run-8", monkeypatch)
    assert place == "a1b2-run-8"
    assert own
    assert "run run-7 trains the same at this moment, so this run trains apart" in capsys.readouterr().err
    own.release(is_finished=True)
    assert set(storage.list_files(own.folder)) == {FINISHED_FILE}, "gc would keep it for a month"
    lease.release(is_finished=False)
    assert choose(address, "run-9", monkeypatch)[0] == "a1b2"


def test_a_run_that_trains_apart_goes_on_there(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(address.replace("{digest}", "a1b2-run-8/checkpoint-3.json"), b"{}")
    assert choose(address, "run-8", monkeypatch)[0] == "a1b2-run-8"


def test_from_the_beginning_means_a_folder_of_ones_own(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(address.replace("{digest}", "a1b2/checkpoint-3.json"), b"{}")
    assert choose(address, "run-8", monkeypatch, from_beginning=True)[0] == "a1b2-run-8"


def test_another_number_of_processes_has_a_folder_of_its_own(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(address, "run-8", monkeypatch, world_size=2)[0] == "a1b2-2-processes"


def test_a_lease_that_is_not_renewed_expires(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expired = json.dumps({"holder": "run-1", "expires": time.time() - 1}).encode()
    storage.write_bytes(address.replace("{digest}", f"a1b2/{LEASE_FILE}"), expired)
    assert choose(address, "run-7", monkeypatch)[0] == "a1b2"


def test_a_lease_is_renewed_while_it_is_held(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_place, "_LEASE_SECONDS", 5.0)
    _, lease = choose(address, "run-7", monkeypatch)
    assert lease

    def expires() -> float:
        return float(json.loads(storage.read_bytes(f"{lease.folder}/{LEASE_FILE}"))["expires"])

    first = expires()
    while expires() == first:
        time.sleep(0.05)
    # The moment at which the lease would be over without a renewal.
    monkeypatch.setattr(checkpoint_place.time, "time", lambda: first + 0.01)
    assert choose(address, "run-8", monkeypatch)[0] == "a1b2-run-8"
    lease.release(is_finished=True)
    assert set(storage.list_files(lease.folder)) == {FINISHED_FILE}


def test_of_two_runs_that_begin_at_the_same_moment_one_trains_apart(s3_uri: str) -> None:
    first, second = (Lease(f"{s3_uri}/a1b2", run) for run in ("run-7", "run-8"))
    with pytest.MonkeyPatch.context() as patch:
        # The second one writes while the first one waits.
        patch.setattr(checkpoint_place.time, "sleep", lambda seconds: second._write())
        assert first.take() == "run-8"
    assert second.is_held()


def test_who_lost_the_lease_uploads_nothing(s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease(f"{s3_uri}/a1b2", "run-7")
    assert not lease.take()
    checkpoints = Checkpoints(tmp_path, f"{s3_uri}/a1b2", 2, "a1b2", 1, lease=lease)
    with checkpoints.written_by_this_run():
        for step in (1, 2):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}/weights").write_text(str(step))
        checkpoints.seal(1)
        checkpoints.finish_upload()
        Lease(f"{s3_uri}/a1b2", "run-8")._write()
        checkpoints.seal(2)
        checkpoints.finish_upload()
    assert "checkpoint-2 is not uploaded" in capsys.readouterr().err
    assert set(storage.list_files(f"{s3_uri}/a1b2")) == {"checkpoint-1.json", LEASE_FILE}
