"""A tracking server that is slow, dies or refuses requests costs a training neither time nor metrics."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from minicpmv_finetune import environment
from minicpmv_finetune.tracking.step_runs import open_step_run
from tests.faults.network_relay import start_relay
from tests.servers import MlflowServer


@pytest.fixture
def own_server(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server for one test, which the test may stop."""
    server = MlflowServer(tmp_path, str(tmp_path / "artifacts"), {}, empty_database)
    server.start()
    monkeypatch.setenv(environment.TRACKING_URI.name, server.uri)
    yield server
    server.stop()


def _history(uri: str, run_id: str | None) -> list[int]:
    assert run_id
    return [point.step for point in MlflowClient(uri).get_metric_history(run_id, "loss")]


def test_a_slow_server_does_not_delay_a_step(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_relay(mlflow_server.uri) as relay:
        monkeypatch.setenv(environment.TRACKING_URI.name, relay.address)
        relay.choose_fault = lambda number: "late"
        run = open_step_run("train")
        started = time.monotonic()
        for step in range(200):
            run.log_metrics({"loss": 0.5}, step)
        assert time.monotonic() - started < 1
        run.finish("FINISHED")
    assert run.unsent == []
    assert _history(mlflow_server.uri, run.run_id) == list(range(200))


def test_a_server_that_is_down_for_a_while_receives_every_step_once(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with start_relay(mlflow_server.uri) as relay:
        monkeypatch.setenv(environment.TRACKING_URI.name, relay.address)
        run = open_step_run("train")
        run.log_metrics({"loss": 3.0}, 1)
        assert run._sending
        run._sending.result()
    for step in (2, 3):
        run.log_metrics({"loss": 2.0}, step)
    run._sending.result()
    assert [point.step for point in run.unsent] == [2, 3]
    with start_relay(mlflow_server.uri, relay.port):
        run.finish("FINISHED")
    assert run.unsent == []
    assert _history(mlflow_server.uri, run.run_id) == [1, 2, 3]


@pytest.mark.faults_only
def test_a_server_that_restarts_receives_every_step_once(
    own_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = open_step_run("train")
    run.log_metrics({"loss": 3.0}, 1)
    assert run._sending
    run._sending.result()
    own_server.stop()
    for step in (2, 3):
        run.log_metrics({"loss": 2.0}, step)
    run._sending.result()
    assert [point.step for point in run.unsent] == [2, 3]
    own_server.start()
    run.finish("FINISHED")
    assert run.unsent == []
    assert _history(own_server.uri, run.run_id) == [1, 2, 3]


def test_metrics_of_a_deleted_run_are_kept_for_the_adapter(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, mlflow_server.uri)
    run = open_step_run("train")
    assert run.run_id
    MlflowClient(mlflow_server.uri).delete_run(run.run_id)
    run.log_metrics({"loss": 3.0}, 1)
    run.finish("FINISHED")
    assert [(point.key, point.step) for point in run.unsent] == [("loss", 1)]
    assert "MLflow tracking is incomplete" in capsys.readouterr().err


def test_a_refused_batch_does_not_block_the_next_one(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, mlflow_server.uri)
    run = open_step_run("train")
    run.log_metrics({"no/such?name": 1.0}, 1)
    assert run._sending
    run._sending.result()
    run.log_metrics({"loss": 2.0}, 2)
    run.finish("FINISHED")
    assert [point.key for point in run.unsent] == ["no/such?name"]
    assert _history(mlflow_server.uri, run.run_id) == [2]
