"""A relay between a client and its server that does harm."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Wire:
    """A TCP relay in front of a server that does to each connection what `rule` says.

    The rule takes the number of the connection, from 0, and names a fault: "reset" closes at the first byte, "cut"
    after the first bytes of the answer, "error" answers with status 500 or 503, "slow" passes 64 KB/s on, "late"
    holds each answer back for a second; None passes everything.
    """

    address: str
    rule: Callable[[int], str | None] = lambda number: None
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def relay(server_address: str) -> Iterator[Wire]:
    """A relay in front of the server at an `http://host:port` address, which passes everything until told otherwise."""
    host, port = server_address.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        wire = Wire(f"http://127.0.0.1:{listener.getsockname()[1]}")
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    client, _ = listener.accept()
                except TimeoutError:
                    continue
                with wire.lock:
                    number = wire.connections
                    wire.connections += 1
                where, fault = (host, int(port)), wire.rule(number)
                threading.Thread(target=_relay_connection, args=(client, where, fault, number), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield wire
        finally:
            over.set()
            thread.join()


def _relay_connection(client: socket.socket, server_address: tuple[str, int], fault: str | None, number: int) -> None:
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
            if fault == "late":
                pause.wait(1)
            if fault == "cut" and passed + len(block) > 20_000:
                sink.sendall(block[: max(20_000 - passed, 0)])
                sink.shutdown(socket.SHUT_RDWR)
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
