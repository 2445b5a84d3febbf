"""A TCP relay between a client and its server that disturbs their connections."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Relay:
    """A running relay.

    Attributes:
        address: Address that clients connect to, `http://host:port`.
        choose_fault: Takes the number of a connection, from 0, and names its fault: "reset" closes the connection at
            the first byte, "cut" closes it after the first bytes of the response, "error" responds with status 500 or
            503, "slow" forwards 64 KB/s, "late" delays each part of the response by a second; None forwards everything.
        clients: The connections so far.
        lock: Protects the connections.
    """

    address: str
    choose_fault: Callable[[int], str | None] = lambda number: None
    clients: list[socket.socket] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def connections(self) -> int:
        """The number of connections so far."""
        return len(self.clients)

    @property
    def port(self) -> int:
        """The port of its address."""
        return int(self.address.rpartition(":")[2])


@contextlib.contextmanager
def start_relay(server_address: str, own_port: int = 0) -> Iterator[Relay]:
    """A relay in front of the server at `http://host:port`, which forwards everything until a test sets a fault.

    After the block it is as if the server were down; with the same port of its own, another relay has it come back.
    """
    host, port = server_address.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", own_port)) as listener:
        listener.settimeout(0.2)
        relay = Relay(f"http://127.0.0.1:{listener.getsockname()[1]}")
        stopping = threading.Event()

        def accept() -> None:
            while not stopping.is_set():
                try:
                    client, _ = listener.accept()
                except TimeoutError:
                    continue
                with relay.lock:
                    number = relay.connections
                    relay.clients.append(client)
                arguments = (client, (host, int(port)), relay.choose_fault(number), number)
                threading.Thread(target=_relay_connection, args=arguments, daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield relay
        finally:
            stopping.set()
            thread.join()
            for client in relay.clients:
                with contextlib.suppress(OSError):  # most are closed
                    client.shutdown(socket.SHUT_RDWR)


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
            threading.Thread(target=_forward, args=(client, server, None), daemon=True).start()
            _forward(server, client, fault)


def _forward(source: socket.socket, sink: socket.socket, fault: str | None) -> None:
    forwarded = 0
    pause = threading.Event()
    try:
        while block := source.recv(8192):
            if fault == "late":
                pause.wait(1)
            if fault == "cut" and forwarded + len(block) > 20_000:
                sink.sendall(block[: max(20_000 - forwarded, 0)])
                sink.shutdown(socket.SHUT_RDWR)
                return
            sink.sendall(block)
            forwarded += len(block)
            if fault == "slow":
                pause.wait(len(block) / 65_536)
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
