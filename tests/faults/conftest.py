"""Real faults: processes that die at a drawn moment, and a store that misbehaves between client and server."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Wire:
    """A TCP relay in front of the store that does to each connection what `rule` says.

    The rule takes the number of the connection, from 0, and names a fault: "reset" closes at the first byte, "cut"
    after the first bytes of the answer, "error" answers with status 500 or 503, "slow" passes 64 KB/s on; None passes
    everything.
    """

    address: str
    rule: Callable[[int], str | None] = lambda number: None
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def wire(s3_server: dict[str, str], s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The store's own server behind a relay, which the environment leads to."""
    host, port = s3_server["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        relay = Wire(f"http://127.0.0.1:{listener.getsockname()[1]}")
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    client, _ = listener.accept()
                except TimeoutError:
                    continue
                with relay.lock:
                    number = relay.connections
                    relay.connections += 1
                fault = relay.rule(number)
                threading.Thread(target=_relay, args=(client, (host, int(port)), fault, number), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.address)
        yield relay
        over.set()
        thread.join()


def _relay(client: socket.socket, server_address: tuple[str, int], fault: str | None, number: int) -> None:
    with client:
        if fault == "reset":
            client.recv(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            return
        if fault == "error":
            client.recv(65536)
            status = (b"500 Internal Server Error", b"503 Slow Down")[number % 2]
            client.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        with socket.create_connection(server_address) as server:
            there = threading.Thread(target=_pump, args=(client, server, None), daemon=True)
            there.start()
            _pump(server, client, fault)


def _pump(source: socket.socket, sink: socket.socket, fault: str | None) -> None:
    passed = 0
    pause = threading.Event()
    try:
        while block := source.recv(8192):
            if fault == "cut" and passed + len(block) > 20_000:
                sink.sendall(block[: max(20_000 - passed, 0)])
                sink.close()
                return
            sink.sendall(block)
            passed += len(block)
            if fault == "slow":
                pause.wait(len(block) / 65_536)
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="session")
def moments() -> int:
    """How many moments of a step are drawn: 1 with the other tests, 3 in `make test-faults`, 20 in the long run."""
    return int(os.environ.get("FAULT_MOMENTS", "1"))


@pytest.fixture(scope="session")
def inputs(tiny_46: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every step needs, made without disturbance: `data.json`, `base`, and the steps' results."""
    import json

    from minicpmv_finetune.components.merge.merge import MergeSettings, merge
    from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
    from minicpmv_finetune.components.train.train import launch
    from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "base").symlink_to(tiny_46)
    for name, count in (("train", 96), ("eval", 16)):
        samples = json.loads((digits / f"{name}.json").read_text())[:count]
        for sample in samples:
            sample["image"] = str(digits / sample["image"])
        (folder / f"{name}.json").write_text(json.dumps(samples))
    validate_data(
        str(folder / "train.json"),
        str(folder / "eval.json"),
        folder / "dataset",
        folder / "rejects.jsonl",
        ValidationSettings(),
    )
    preprocess(
        folder / "dataset", str(tiny_46), folder / "shards", folder / "preprocess-rejects.jsonl", PreprocessSettings()
    )
    launch([*TRAIN.split(), *_where(folder), "--output_dir", str(folder / "adapter")])
    merge(str(tiny_46), folder / "adapter", folder / "shards", folder / "model", folder / "merge.json", MergeSettings())
    return folder


TRAIN = (
    "--use_lora true --tune_llm false --lora_r 4 --learning_rate 1e-3 --per_device_train_batch_size 16 "
    "--num_train_epochs 2 --save_strategy steps --save_steps 3 --logging_steps 1"
)


def _where(folder: Path) -> list[str]:
    return ["--model_name_or_path", str(folder / "base"), "--data_path", str(folder / "shards")]
