"""Real servers on this machine for the tests."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def listens(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


class MlflowServer:
    """A real MLflow server with its own database; it can be stopped and started again at the same address."""

    def __init__(self, folder: Path, artifacts: str, environment: dict[str, str], empty_database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        # Processes that write at the same time wait for each other.
        (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
        database = f"sqlite:///{folder / 'mlflow.db'}?timeout=60"
        options = ["--backend-store-uri", database, "--artifacts-destination", artifacts, "--workers", "1"]
        self._command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), *options]
        self._environment = {**os.environ, **environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not listens("127.0.0.1", self.port):
            with suppress(subprocess.TimeoutExpired):
                raise RuntimeError(f"mlflow ended with exit code {self._process.wait(timeout=0.1)}")

    def stop(self) -> None:
        if self._process is not None:
            # The server's workers are separate processes.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Webhook(HTTPServer):
    """A web server that stores each message, and answers with each status of `answers` in turn, then with the last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[dict[str, str]] = []
        self.answers = [200]
        self.url = f"http://127.0.0.1:{self.server_port}/secret-path"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        answers = self.server.answers
        status = answers.pop(0) if len(answers) > 1 else answers[0]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if status == 200:
            self.server.received.append(json.loads(content))
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Print no log."""
