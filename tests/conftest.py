import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Two test processes share two cores; without this each would start a thread a core for every matrix product.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_46(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCPM-V 4.6 checkpoint of a million random parameters."""
    from minicpmv_finetune.pipelines.demo import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny_46"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random checkpoint of any generation, by its version."""
    from tiny import write_tiny

    return lru_cache(lambda version: write_tiny(tmp_path_factory.mktemp("tiny") / version, version))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, `eval.json` and the pictures of handwritten digits."""
    from minicpmv_finetune.pipelines.demo import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server: the environment variables that lead to it, and to nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    key, secret = "minioadmin", "minioadmin123"
    rclone = [Path(sys.executable).with_name("rclone"), "serve", "s3", tmp_path_factory.mktemp("s3")]
    options = ["--addr", f"{host}:{port}", "--auth-key", f"{key},{secret}"]
    with subprocess.Popen([*rclone, *options], stderr=subprocess.DEVNULL) as server:
        while not _listens(host, port):
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


def _listens(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


@pytest.fixture(scope="session")
def s3_client(s3_server: dict[str, str]) -> "S3Client":
    """For what the tests do behind the program's back."""
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
    """An empty bucket of its own, which the environment leads to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def unreachable() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
