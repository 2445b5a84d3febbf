"""Where a server listens: on this machine alone, unless it asks its clients for a key."""

import errno
import socket
from typing import Literal

from minicpmv_finetune.errors import UserError

Server = Literal["auto", "transformers", "vllm"]
LOOPBACK = ("127.0.0.1", "localhost")
DEFAULT_HOST = LOOPBACK[0]


def require_loopback(host: str, reason: str) -> None:
    """Refuse an address that other machines can reach.

    Args:
        host: Address to listen on.
        reason: Why it must be this machine's alone, for the message.

    Raises:
        UserError: It is another address.
    """
    if host not in LOOPBACK:
        raise UserError(f"--host: {host}: {reason}; give {DEFAULT_HOST}, which only this machine reaches.")


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that another program has, before a model is loaded for minutes.

    Raises:
        UserError: The port or the address cannot be used.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: connections that have just ended do not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port: {port} is used by another program; give another one.") from error
            raise UserError(f"{host}:{port} cannot be listened on ({error}); give another --host or --port.") from error
