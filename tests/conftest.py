import gc
import inspect
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers import MlflowServer, Webhook, listens

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Test processes run side by side; without this each would start a thread per core for every matrix product, and find
# out first whether it runs alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# After a fault a step tries again once, at once.
os.environ.setdefault("MINICPMV_FINETUNE_RETRY_WAITS", "0")


def pytest_configure() -> None:
    """Replace `inspect.stack`, which kfp calls 150 times to compile a pipeline, by a fast version.

    kfp needs only the caller's name, but `inspect.stack` also looks for the module and source of each frame. With
    pytest's deep stack and torch's many modules that takes half a minute. Some modules compile one when they are
    imported, before there are fixtures.
    """

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        frames, frame = [], inspect.currentframe()
        while frame := frame and frame.f_back:
            code = frame.f_code
            frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        return frames

    pytest.MonkeyPatch().setattr("inspect.stack", stack)


def pytest_collection_finish() -> None:
    """Leave the modules of all libraries and tests, a million objects, out of each later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the process end as usual; libraries otherwise list what was never freed."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_46(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCPM-V 4.6 checkpoint with a million random parameters."""
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny_46"), corpus=DEMO_CORPUS)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random checkpoint of any generation, by its version."""
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS

    folder = tmp_path_factory.mktemp("tiny")
    return lru_cache(lambda version: write_tiny_checkpoint(folder / version, version, corpus=DEMO_CORPUS))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, `eval.json` and the images of handwritten digits."""
    from minicpmv_finetune.pipelines.demo import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server; returns the environment variables that make boto3 use this server and nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    key, secret = "minioadmin", "minioadmin123"
    rclone = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(tmp_path_factory.mktemp("s3"))]
    options = ["--addr", f"{host}:{port}", "--auth-key", f"{key},{secret}"]
    with subprocess.Popen([*rclone, *options], stderr=subprocess.DEVNULL) as server:
        while not listens(host, port):
            with suppress(subprocess.TimeoutExpired):
                raise RuntimeError(f"rclone ended with exit code {server.wait(timeout=0.02)}")
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        server.terminate()


@pytest.fixture(scope="session")
def s3_client(s3_server: dict[str, str]) -> "S3Client":
    """A client of the S3 server for actions of the test itself, independent of the code under test."""
    import boto3

    return boto3.session.Session().client(
        "s3",
        endpoint_url=s3_server["AWS_ENDPOINT_URL"],
        aws_access_key_id=s3_server["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3_server["AWS_SECRET_ACCESS_KEY"],
        region_name=s3_server["AWS_DEFAULT_REGION"],
    )


@pytest.fixture
def s3_uri(s3_server: dict[str, str], s3_client: "S3Client", monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket for one test, on the S3 server that the environment names."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def mlflow_server(
    tmp_path_factory: pytest.TempPathFactory, s3_server: dict[str, str], s3_client: "S3Client", empty_database: Path
) -> Iterator[MlflowServer]:
    """An MLflow server that stores the artifacts of runs in a real S3 server."""
    bucket = f"mlflow-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=bucket)
    server = MlflowServer(tmp_path_factory.mktemp("mlflow_server"), f"s3://{bucket}", s3_server, empty_database)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A web server that the environment names as the receiver of notifications."""
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("MINICPMV_FINETUNE_WEBHOOK_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its schema, which takes seconds to create."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An MLflow database for one test, which the environment names together with the id of a pipeline run."""
    path = tmp_path / "tracking" / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(empty_database.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setenv("KFP_RUN_ID", "pipeline-run-1")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def unreachable() -> str:
    """An address at which no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
