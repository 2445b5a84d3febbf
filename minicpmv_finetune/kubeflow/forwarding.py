"""Addresses inside the cluster from a machine outside of it, through a port-forward as `kubectl` makes one.

A profile names servers as pods see them: `http://seaweedfs.kubeflow:9000`. From outside, this process opens a local
port whose connections go through the Kubernetes API to a pod of that Service, with the rights of the kubeconfig. The
port is open as long as the process lives.
"""

import contextlib
import os
import socket
import struct
import threading
from functools import lru_cache
from urllib.parse import urlsplit

import kubernetes
import websocket
from kubernetes.stream.ws_client import create_websocket, get_websocket_url

from minicpmv_finetune import environment
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.kubernetes_terms import service_of

from .kubernetes_access import call_kubernetes, is_inside_cluster, kubernetes_client

_PIECE = 1 << 16  # bytes in one frame
_DATA, _ERROR = b"\x00", b"\x01"  # channels of the first forwarded port


def reachable(address: str) -> str:
    """The address through which this process reaches a server that a profile names.

    That is the address itself inside the cluster, without a kubeconfig, and where its host is no Service of the
    kubeconfig's cluster; else the address of a local port that is forwarded to the Service.

    Raises:
        AccessError: The kubeconfig's user may not read Services or pods.
        UserError: The Service has no running pod.
        RetryableError: Kubernetes does not answer.
    """
    parts = urlsplit(address)
    service = service_of(address)
    if service is None or is_inside_cluster():
        return address
    port = _forward(*service, parts.port or 80, (environment.KUBECONFIG.read(), os.getpid()))
    if port is None:
        return address
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()


def resolves(address: str) -> bool:
    """Whether the host of a web address is known here; true for an address of another kind, such as a file."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return True
    try:
        return bool(socket.getaddrinfo(parts.hostname, parts.port or 80))
    except (OSError, ValueError):
        return False


@lru_cache
def _forward(service: str, namespace: str, port: int, origin: tuple[str, int]) -> int | None:
    """A local port that is forwarded to a Service; None if there is no kubeconfig or no such Service.

    The kubeconfig and the process, as `origin`, are part of what is remembered.
    """
    client = kubernetes_client()
    if client is None:
        return None
    core = kubernetes.client.CoreV1Api(client)
    found = call_kubernetes(f"read Service {service} in {namespace}", core.read_namespaced_service, service, namespace)
    if found is None:
        return None
    tunnels = _Tunnels(client, core, found, port)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener, tunnels), daemon=True).start()
    return int(listener.getsockname()[1])


class _Tunnels:
    """Opens connections to a pod of a Service; to another one where that pod is gone, as after a server's upgrade."""

    def __init__(
        self,
        client: kubernetes.client.ApiClient,
        core: kubernetes.client.CoreV1Api,
        service: kubernetes.client.V1Service,
        port: int,
    ) -> None:
        self._client, self._core, self._service, self._port = client, core, service, port
        self._target = _endpoint(core, service, port)

    def open(self) -> tuple[websocket.WebSocket, int]:
        """A connection, and the pod's port that it leads to.

        Raises:
            websocket.WebSocketException, OSError, UserError, RetryableError: No pod of the Service answers.
        """
        try:
            return self._open()
        except (websocket.WebSocketException, OSError):
            self._target = _endpoint(self._core, self._service, self._port)
            return self._open()

    def _open(self) -> tuple[websocket.WebSocket, int]:
        pod, port = self._target
        path = f"/api/v1/namespaces/{self._service.metadata.namespace}/pods/{pod}/portforward"
        return _open_tunnel(self._client, path, port), port


def _endpoint(core: kubernetes.client.CoreV1Api, service: kubernetes.client.V1Service, port: int) -> tuple[str, int]:
    """A ready pod of a Service, and the pod's port for the Service's port."""
    name, namespace = service.metadata.name, service.metadata.namespace
    target = next((item.target_port or item.port for item in service.spec.ports or [] if item.port == port), None)
    if target is None:
        offered = ", ".join(str(item.port) for item in service.spec.ports or [])
        raise UserError(f"Service {name} in {namespace} has no port {port} (it has {offered}); correct the address.")
    selector = ",".join(f"{key}={value}" for key, value in (service.spec.selector or {}).items())
    listed = call_kubernetes(f"list pods in {namespace}", core.list_namespaced_pod, namespace, label_selector=selector)
    for pod in listed.items if listed and selector else []:
        ready = any(item.type == "Ready" and item.status == "True" for item in pod.status.conditions or [])
        number = target if isinstance(target, int) or str(target).isdigit() else _named_port(pod, target)
        if ready and number is not None:
            return pod.metadata.name, int(number)
    raise UserError(f"Service {name} in {namespace} has no pod that is ready; see kubectl -n {namespace} get pods.")


def _named_port(pod: kubernetes.client.V1Pod, name: str) -> int | None:
    ports = [port for container in pod.spec.containers for port in container.ports or []]
    return next((port.container_port for port in ports if port.name == name), None)


def _serve(listener: socket.socket, tunnels: _Tunnels) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_pass_on, args=(connection, tunnels), daemon=True).start()


def _pass_on(connection: socket.socket, tunnels: _Tunnels) -> None:
    """Pass the bytes of one local connection to a pod's port and back, until one side ends.

    Not with the library's own PortForward: it takes in whatever the local side sends, so an upload of gigabytes would
    wait in memory.
    """
    with contextlib.closing(connection):
        try:
            tunnel, port = tunnels.open()
        except (websocket.WebSocketException, OSError, UserError, RetryableError):
            return  # the client of the local port reports that the server does not answer
        threading.Thread(target=_send, args=(connection, tunnel), daemon=True).start()
        with contextlib.suppress(websocket.WebSocketException, OSError):
            _receive(connection, tunnel, port)
        tunnel.abort()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # ends the other thread's wait


def _open_tunnel(client: kubernetes.client.ApiClient, path: str, port: int) -> websocket.WebSocket:
    headers: dict[str, str] = {}
    client.update_params_for_auth(headers, [], ["BearerToken"])
    url = get_websocket_url(f"{client.configuration.host}{path}", [("ports", str(port))])
    return create_websocket(client.configuration, url, headers)


def _send(connection: socket.socket, tunnel: websocket.WebSocket) -> None:
    with contextlib.suppress(websocket.WebSocketException, OSError):
        while content := connection.recv(_PIECE):
            tunnel.send_binary(_DATA + content)
        tunnel.abort()  # ends the other thread's wait


def _receive(connection: socket.socket, tunnel: websocket.WebSocket, port: int) -> None:
    """Write what the pod sends; each channel begins with the number of the port, and the second reports errors."""
    begun: set[bytes] = set()
    while True:
        frame = tunnel.recv()
        if not isinstance(frame, bytes) or not frame:
            return
        channel, content = frame[:1], frame[1:]
        if channel not in begun and content == struct.pack("<H", port):
            begun.add(channel)
        elif channel == _DATA:
            connection.sendall(content)
        elif channel == _ERROR and content:
            return
