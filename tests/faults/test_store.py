"""A store that fails: requests are retried within bounds, then one sentence is reported, and no copy is damaged."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError
from tests.faults.network_relay import Relay

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONTENT = os.urandom(300_000)


@pytest.fixture
def stored(s3_uri: str) -> str:
    """An object of 300 KB in the store."""
    uri = f"{s3_uri}/data/file.bin"
    storage.write_bytes(uri, CONTENT)
    return uri


@pytest.mark.parametrize("fault", ["reset", "error", "cut"])
def test_reading_survives_a_short_burst_of_faults(stored: str, s3_relay: Relay, fault: str) -> None:
    s3_relay.choose_fault = lambda number: fault if number < 2 else None
    assert storage.read_bytes(stored) == CONTENT


@pytest.mark.parametrize("fault", ["reset", "error", "cut"])
def test_a_permanent_fault_ends_in_one_sentence_and_leaves_no_file(
    stored: str, s3_relay: Relay, tmp_path: Path, fault: str
) -> None:
    s3_relay.choose_fault = lambda number: fault
    started = time.monotonic()
    with pytest.raises(RetryableError) as error:
        storage.fetch(stored, tmp_path / "cache")
    assert time.monotonic() - started < 60
    assert "\n" not in str(error.value)
    assert stored in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_reading_waits_for_a_slow_store(stored: str, s3_relay: Relay) -> None:
    s3_relay.choose_fault = lambda number: "slow"
    assert hashlib.sha256(storage.read_bytes(stored)).digest() == hashlib.sha256(CONTENT).digest()


def test_a_folder_that_changes_while_it_is_read_is_refused(
    s3_uri: str, s3_client: "S3Client", s3_relay: Relay, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        storage.write_bytes(f"{s3_uri}/base/{name}", CONTENT)
    started, fetched = threading.Event(), tmp_path / "cache"

    def overwrite() -> None:
        started.wait(60)
        s3_client.put_object(Bucket=s3_uri.removeprefix("s3://"), Key="base/b", Body=b"another version")

    writer = threading.Thread(target=overwrite)
    writer.start()
    before = s3_relay.connections

    def choose_fault(number: int) -> str:
        if number > before:
            started.set()
        return "slow"

    s3_relay.choose_fault = choose_fault
    with pytest.raises(RetryableError, match="changed while it was read"):
        storage.fetch(f"{s3_uri}/base", fetched)
    writer.join(60)
    assert not [path for path in fetched.rglob("*") if path.is_file()]
    s3_relay.choose_fault = lambda number: None
    assert (storage.fetch(f"{s3_uri}/base", fetched) / "b").read_bytes() == b"another version"


def test_an_upload_that_fails_leaves_no_object(s3_uri: str, s3_relay: Relay, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    s3_relay.choose_fault = lambda number: "reset"
    with pytest.raises(RetryableError):
        storage.upload_file(tmp_path / "file", f"{s3_uri}/up/file")
    s3_relay.choose_fault = lambda number: None
    assert storage.list_files(f"{s3_uri}/up") == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-of-some-length"}, "access denied"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access denied"),
    ],
)
def test_wrong_credentials_are_a_mistake_of_the_user(
    stored: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], sentence: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence) as error:
        storage.read_bytes(stored)
    assert "wrong-secret" not in str(error.value)


def test_a_command_without_its_store_ends_with_75(tmp_path: Path, unreachable: str, s3_uri: str) -> None:
    command = [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()", "validate-data"]
    arguments = ["--data", f"{s3_uri}/data.json", "--out", str(tmp_path / "dataset")]
    environment = {**os.environ, "AWS_ENDPOINT_URL": unreachable}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dataset").exists()
