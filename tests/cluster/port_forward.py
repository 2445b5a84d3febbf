"""A pod's port over the WebSocket protocol of `kubectl port-forward`, for the fake of Kubernetes.

As the kubelet does (v4.channel.k8s.io): each port has a data channel and an error channel, whose first message is the
port's number; then the first byte of each message is the channel.
"""

import base64
import hashlib
import socket
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def forward(handler: BaseHTTPRequestHandler, port: int, target: tuple[str, int]) -> None:
    """Answer a request for a port-forward, and pass bytes between it and a server until one side ends."""
    key = handler.headers["Sec-WebSocket-Key"]
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    handler.send_header(
        "Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()
    )
    handler.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
    handler.end_headers()
    handler.close_connection = True
    with socket.create_connection(target) as server:
        for channel in (b"\x00", b"\x01"):
            _send(handler, channel + struct.pack("<H", port))
        threading.Thread(target=_answer, args=(handler, server), daemon=True).start()
        with suppress(OSError, ValueError, struct.error):
            while content := _receive(handler):
                assert content[:1] == b"\x00"
                server.sendall(content[1:])


def _answer(handler: BaseHTTPRequestHandler, server: socket.socket) -> None:
    with suppress(OSError, ValueError):
        while content := server.recv(1 << 15):
            _send(handler, b"\x00" + content)
        handler.connection.shutdown(socket.SHUT_RDWR)


def _send(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    size = len(content)
    header = struct.pack("!BB", 0x82, size) if size < 126 else struct.pack("!BBH", 0x82, 126, size)
    handler.wfile.write(header + content)


def _receive(handler: BaseHTTPRequestHandler) -> bytes:
    """The next message of the client, whose bytes are masked; empty at its end."""
    first, size = struct.unpack("!BB", handler.rfile.read(2))
    if first & 0x0F == 8:
        return b""
    size &= 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", handler.rfile.read(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", handler.rfile.read(8))
    mask = handler.rfile.read(4) * (size // 4 + 1)
    content = handler.rfile.read(size)
    return (int.from_bytes(content) ^ int.from_bytes(mask[:size])).to_bytes(size)
