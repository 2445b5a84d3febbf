"""Check before a run that everything it needs is available; a failed check states the remedy.

The checks run where the command runs, with its credentials. A check that is not possible from there, such as of
Secrets without access to Kubernetes, is reported as skipped and is no failure.
"""

import base64
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import kubernetes
from kubernetes.utils.quantity import parse_quantity

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import AccessError, RetryableError, UserError, without_password
from minicpmv_finetune.pipelines import all_pipelines

from .checks import Check, SkippedError, run_check
from .client import Cluster, connect
from .forwarding import reachable
from .installation import check_images, check_installation
from .kubernetes_access import kubernetes_client, read_object
from .parameters import base_model_place, not_reachable, pin_to_commit
from .profile import Accelerator, Profile, StepSettings
from .store import pipeline_root, read_keys, use_store
from .tracking_server import use_tracking

_OLDEST_KUBEFLOW = (2, 17)
_CREDENTIALS = ("USERNAME", "PASSWORD", "TOKEN")  # MLflow's variables end so


def check_cluster(profile: Profile, data: str = "", base_model: str = "") -> list[Check]:
    """Check everything that a run with this profile needs.

    Args:
        profile: Settings of the cluster.
        data: Training data; empty leaves this check out.
        base_model: Base checkpoint; empty leaves this check out.
    """
    found: list[Cluster] = []
    checks = [
        run_check("Kubeflow Pipelines", check_kubeflow, profile, found),
        run_check("container images", check_images, profile),
        run_check("object storage", _check_object_storage, profile),
        run_check("MLflow", _check_mlflow, profile),
        *(run_check(f"shared memory of {step}", _check_shared_memory, profile, step) for step in profile.steps),
        *_check_kubernetes(profile, found[0] if found else None),
    ]
    if data:
        checks.append(run_check("data", _check_data, data, profile))
    if base_model:
        checks.append(run_check("base model", _check_base_model, base_model, profile))
    return checks


def check_kubeflow(profile: Profile, found: list[Cluster]) -> str:
    """Check the server, and leave it in `found` for other checks."""
    cluster = connect(profile)
    found.append(cluster)
    health = cluster.call(cluster.client.healthzs.healthz_service_get_healthz, _preload_content=False)
    release = str(json.loads(health.data).get("tag_name") or "unknown")
    if (match := re.match(r"v?(\d+)\.(\d+)", release)) and (int(match[1]), int(match[2])) < _OLDEST_KUBEFLOW:
        raise UserError(f"{cluster.endpoint} has version {release}; upgrade it to 2.17 or newer.")
    users = "several users" if cluster.namespace else "one user"
    uploaded = [pipeline.name for pipeline in all_pipelines().values() if cluster.pipeline_id(pipeline.name)]
    pipelines = f"uploaded: {', '.join(uploaded)}" if uploaded else "no pipeline uploaded yet"
    if release == "unknown":
        release = "unknown (its image was built without a version, so compare it with 2.17 yourself)"
    return f"{cluster.endpoint}, version {release}, {users}, {pipelines}"


def _check_object_storage(profile: Profile) -> str:
    """Write, read and delete an object with the keys that the run's pods will have, if they can be read from here."""
    if keys := read_keys(profile):
        os.environ.pop("AWS_SESSION_TOKEN", None)  # belongs to the keys of this machine
        os.environ.update(keys)
    use_store(profile)
    whose = f"the keys of Secret {profile.s3.secret}" if keys else "the keys of this machine"
    try:
        root = pipeline_root(profile)
    except AccessError as error:
        raise SkippedError(str(error)) from error
    uri, content = storage.join(root, f".preflight-{uuid.uuid4()}"), os.urandom(64)
    storage.write_bytes(uri, content)
    try:
        if storage.read_bytes(uri) != content:
            raise UserError(f"{uri}: the content that was read differs from what was written; check the store.")
    finally:
        storage.remove_file(uri)
    return f"wrote, read and deleted an object in {root} with {whose}"


def _check_mlflow(profile: Profile) -> str:
    uri = environment.TRACKING_URI.read() or (profile.mlflow.tracking_uri if profile.mlflow else "")
    if not use_tracking(profile):
        raise SkippedError("the profile names none, so the gate decides and no model is registered")
    if not uri.startswith(("http://", "https://")):
        raise SkippedError(f"{uri} is not a server")
    address = reachable(environment.TRACKING_URI.read())
    try:
        with urllib.request.urlopen(_request(f"{address.rstrip('/')}/version"), timeout=10) as answer:  # noqa: S310
            return f"{uri}, version {answer.read(100).decode(errors='replace').strip()}"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{uri}: access denied ({error.code}); name its credentials in the profile, and this host in "
                "MLFLOW_SERVER_ALLOWED_HOSTS of the server."
            ) from error
        raise RetryableError(f"{uri}: answered {error.code}; try again.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RetryableError(
            f"{uri}: MLflow does not answer ({error}); check the network, or set {environment.TRACKING_URI} to an "
            "address that can be reached from here."
        ) from error


def _request(address: str) -> urllib.request.Request:
    """A request to MLflow, with a user and password of the address or else with what MLflow's own client sends."""
    parts = urllib.parse.urlsplit(address)
    # urllib cannot connect to an address that contains a user and password.
    request = urllib.request.Request(without_password(address))  # noqa: S310 - the caller has checked the scheme
    user, password, token = (environment.Variable(f"MLFLOW_TRACKING_{name}", "").read() for name in _CREDENTIALS)
    if parts.username is not None:
        user, password = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
    if user:
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {basic}")
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    return request


def _check_shared_memory(profile: Profile, step: str) -> str:
    settings = profile.steps[step]
    if settings.shared_memory is None:
        if settings.accelerator:
            raise UserError(
                f"steps.{step}.shared_memory: not set, and the default of 64 MB leads to a bus error; set it to 8Gi or "
                "more."
            )
        raise SkippedError("not needed without a GPU")
    if parse_quantity(settings.shared_memory) >= parse_quantity(settings.memory[1]):
        raise UserError(
            f"steps.{step}.shared_memory: {settings.shared_memory} of the memory limit of {settings.memory[1]} leaves "
            "nothing for the process; raise the limit."
        )
    return f"{settings.shared_memory} of {settings.memory[1]}"


def _check_kubernetes(profile: Profile, cluster: Cluster | None) -> Iterator[Check]:
    """Check the namespace, and what the profile names in it: Secrets, claims, GPUs, queues, the training runtime."""
    client = kubernetes_client()
    if client is None:
        yield Check("Kubernetes", "skipped", "no kubeconfig; namespace, Secrets, GPUs and queues are not checked")
        return
    core, namespace = kubernetes.client.CoreV1Api(client), profile.namespace
    yield from check_installation(profile, cluster, core)
    for claim in profile.claims():
        read = partial(core.read_namespaced_persistent_volume_claim, claim, namespace)
        yield run_check(f"claim {claim}", read_object, read, "create it, or apply an overlay of k8s/ that has it")
    for step, settings in profile.steps.items():
        yield from _check_step(core, namespace, step, settings)
    if profile.runtime:
        remedy = "apply it, see k8s/README.md (Several nodes), or remove the runtime from the profile"
        read = _custom_object("trainer.kubeflow.org", "v1alpha1", namespace, "trainingruntimes", profile.runtime)
        yield run_check(f"training runtime {profile.runtime}", read_object, read, remedy)


def _check_step(
    core: kubernetes.client.CoreV1Api, namespace: str, step: str, settings: StepSettings
) -> Iterator[Check]:
    """Check the GPUs and the queue of a step."""
    if settings.accelerator:
        selector = ",".join(f"{key}={value}" for key, value in settings.node_selector.items())
        read = partial(core.list_node, label_selector=selector)
        describe = partial(_describe_gpus, settings.accelerator, selector)
        yield run_check(f"GPUs of {step}", read_object, read, "request permission to list nodes", describe)
    if settings.queue:
        remedy = "apply k8s/components/kueue, or remove the queue from the profile"
        read = _custom_object("kueue.x-k8s.io", "v1beta2", namespace, "localqueues", settings.queue)
        yield run_check(f"queue of {step}", read_object, read, remedy)


def _custom_object(*path: str) -> partial[Any]:
    return partial(kubernetes.client.CustomObjectsApi(kubernetes_client()).get_namespaced_custom_object, *path)


def _describe_gpus(accelerator: Accelerator, selector: str, answer: Any) -> str:
    resource, wanted = accelerator.resource, accelerator.count
    counts = [int((node.status.allocatable or {}).get(resource, "0")) for node in answer.items]
    fitting = sum(count >= wanted for count in counts)
    if not any(counts):
        raise UserError(
            f"no node with {selector or 'any label'} offers any {resource}; add a node with its device plugin, correct "
            "node_selector in the profile, or run without by --gpus 0."
        )
    if not fitting:
        raise UserError(
            f"no node with {selector or 'any label'} offers {wanted} {resource} (at most {max(counts)}); "
            "correct node_selector or count in the profile."
        )
    return f"{fitting} nodes offer {wanted} {resource}"


def _check_data(uri: str, profile: Profile) -> str:
    if claim := profile.claim_of(uri):
        raise SkippedError(f"{uri} is on the claim {claim}, which only pods can read")
    files = storage.expand(uri)
    for file in files:
        storage.read_bytes(file, (0, 1))
    return f"{len(files)} readable file{'s' if len(files) > 1 else ''} at {uri}"


def _check_base_model(uri: str, profile: Profile) -> str:
    place = base_model_place(uri, profile)
    if place == "volume":
        raise SkippedError(f"{uri} is on the claim {profile.claim_of(uri)}, which only pods can read")
    if place == "this machine":
        raise UserError(not_reachable("base_model_uri", uri))
    if place == "hub":
        return pin_to_commit(uri, profile)
    if "config.json" not in storage.list_files(uri):
        raise UserError(f"{uri}: contains no config.json, so it is not a checkpoint; check the URI.")
    return f"a checkpoint at {uri}"
