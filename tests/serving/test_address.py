"""Where a server may listen."""

import socket

import pytest

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.serving.address import require_free_port, require_loopback


def test_only_this_machine_reaches_the_loopback() -> None:
    require_loopback("127.0.0.1", "")
    require_loopback("localhost", "")
    with pytest.raises(UserError, match=r"--host: 0\.0\.0\.0: it has no keys; give 127"):
        require_loopback("0.0.0.0", "it has no keys")


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: {port} is used by another program"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be listened on"):
        require_free_port("192.0.2.1", 0)
