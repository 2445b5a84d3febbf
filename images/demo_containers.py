"""The demo in container images: every step in a container, as user 1000, with artifacts on an S3 server.

    python images/demo_containers.py build/demo-containers

Podman takes the role of the cluster's nodes and rclone the role of its object store: a real S3 server, mounted at the
pipeline root, so that the files that steps write become objects. Data and base model are read from this server by
s3:// URI. Needs Podman, FUSE and the container images of `make images`; run it as root if containers cannot be started
otherwise.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

RCLONE, MLFLOW = (str(Path(sys.executable).with_name(name)) for name in ("rclone", "mlflow"))
BUCKET = "minicpmv-finetune"
KEYS = {"AWS_ACCESS_KEY_ID": "demonstration", "AWS_SECRET_ACCESS_KEY": "demonstration-only"}


def main(out: Path) -> None:
    """Start the servers, run the pipeline, and write and print a summary of the results."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.umask(0)  # containers write as another user
    with ExitStack() as services:
        address = services.enter_context(_s3_server(out.absolute() / "s3"))
        os.environ.update(
            {
                **KEYS,
                "AWS_ENDPOINT_URL": f"http://{address}",
                "AWS_DEFAULT_REGION": "us-east-1",
                "MINICPMV_FINETUNE_REGISTRY": "localhost/minicpmv-finetune",
                "DOCKER_HOST": services.enter_context(_container_service(out.absolute() / "podman.sock")),
            }
        )
        os.environ["MLFLOW_TRACKING_URI"] = services.enter_context(_mlflow_server(out.absolute()))
        (out / "run").mkdir()
        services.enter_context(_mounted(f"{BUCKET}/artifacts", out.absolute() / "run" / "artifacts"))
        _run(out)


def _run(out: Path) -> None:
    import boto3

    from minicpmv_finetune import storage
    from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
    from minicpmv_finetune.pipelines.demo import DEMO_CORPUS, DEMO_INPUTS, write_digits
    from minicpmv_finetune.pipelines.local import run_pipeline

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    write_digits(out / "digits", seed=42)
    write_tiny_checkpoint(out / "base", corpus=DEMO_CORPUS)
    for folder in ("digits", "base"):
        for path in (path for path in (out / folder).rglob("*") if path.is_file()):
            storage.upload_file(path, f"s3://{BUCKET}/{path.relative_to(out).as_posix()}")
    inputs = {
        "data_uri": f"s3://{BUCKET}/digits/train.json",
        "eval_data_uri": f"s3://{BUCKET}/digits/eval.json",
        "base_model_uri": f"s3://{BUCKET}/base",
        "seed": 42,
        **DEMO_INPUTS,
    }
    run = run_pipeline(out / "run", inputs, "docker")
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    summary = {
        "exact_match": run.scores()["tuned_exact_match"],
        "seconds": dict(run.seconds),
        "users_that_wrote": sorted({path.stat().st_uid for path in files}),
        "objects": _count_objects(f"s3://{BUCKET}/artifacts", len(files)),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def _count_objects(uri: str, files: int) -> int:
    """Number of objects, after waiting until there is one for every file: the mount uploads files with a delay."""
    from minicpmv_finetune import storage

    deadline = time.monotonic() + 180
    while (objects := len(storage.walk(uri))) < files and time.monotonic() < deadline:
        time.sleep(0.5)
    return objects


@contextmanager
def _s3_server(folder: Path) -> Iterator[str]:
    """Run an S3 server that stores objects in a folder; yields its address."""
    folder.mkdir()
    port = _free_port()
    command = [RCLONE, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    # rclone parses a list in the environment as CSV, so the comma inside a pair needs quotes.
    with _running(command, {"RCLONE_AUTH_KEY": f'"{",".join(KEYS.values())}"'}):
        _wait_until(lambda: _listens(port), "the S3 server")
        yield f"127.0.0.1:{port}"


@contextmanager
def _mlflow_server(folder: Path) -> Iterator[str]:
    """Run an MLflow server on an SQLite database; yields its address."""
    port = _free_port()
    server = [MLFLOW, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/mlflow"]
    with _running([*server, *stores], {"MLFLOW_DISABLE_TELEMETRY": "true"}):
        _wait_until(lambda: _listens(port), "MLflow")
        yield f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _mounted(path: str, folder: Path) -> Iterator[None]:
    """Mount a path of the S3 server as a folder."""
    folder.mkdir()
    remote = {
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENDPOINT": os.environ["AWS_ENDPOINT_URL"],
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_FORCE_PATH_STYLE": "true",
    }
    options = ["--allow-other", "--vfs-cache-mode", "full", "--vfs-write-back", "1s", "--uid", "1000", "--gid", "1000"]
    command = [
        RCLONE,
        "mount",
        f":s3:{path}",
        str(folder),
        *options,
        "--umask",
        "000",
        "--cache-dir",
        f"{folder}.cache",
    ]
    with _running(command, remote):
        try:
            _wait_until(folder.is_mount, "the mounted store")
            yield
        finally:
            subprocess.run(["fusermount3", "-u", "-z", folder], check=False)  # noqa: S603, S607


@contextmanager
def _container_service(path: Path) -> Iterator[str]:
    """Run Podman's Docker-compatible service; yields the address for DOCKER_HOST."""
    with _running(["podman", "system", "service", "--time", "0", f"unix://{path}"], {}):
        _wait_until(path.exists, "podman's service")
        yield f"unix://{path}"


@contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        try:
            yield
        finally:
            process.terminate()


def _wait_until(ready: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + 180
    while not ready():
        if time.monotonic() > deadline:
            sys.exit(f"error: {name} did not start within 180 seconds")
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
