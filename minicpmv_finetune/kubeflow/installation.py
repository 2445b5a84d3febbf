"""Checks of a Kubeflow installation against a profile: where runs really live, and what their namespace must have.

What each check looks for is what the recorded installations have: Kubeflow Pipelines 2.17 with one user, and with
several.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import kubernetes
import yaml

from minicpmv_finetune import container_images, environment
from minicpmv_finetune.errors import AccessError, RetryableError, UserError
from minicpmv_finetune.kubernetes_terms import service_of

from .checks import Check, SkippedError, run_check
from .client import Cluster
from .kubernetes_access import call_kubernetes, kubernetes_client, read_object
from .profile import Profile
from .store import LAUNCHER

_IMAGES = {"data": container_images.DATA_IMAGE, "trainer": container_images.TRAINER_IMAGE}
_STOCK_NAMESPACE = "kubeflow"
_API_SERVICE = "ml-pipeline"
_CONTROLLER = "workflow-controller-configmap"
_PROFILE_LABELS = {"pipelines.kubeflow.org/enabled": "true", "app.kubernetes.io/part-of": "kubeflow-profile"}
_LAUNCHERS_SECRET, _LAUNCHERS_KEYS = "mlpipeline-minio-artifact", {"accesskey", "secretkey"}


def check_installation(profile: Profile, cluster: Cluster | None, core: kubernetes.client.CoreV1Api) -> Iterator[Check]:
    """Check the namespace of the runs, what Kubeflow itself needs there, and what every pod of a run names.

    Args:
        profile: Settings of the cluster.
        cluster: The server; None if it does not answer.
        core: Kubernetes.
    """
    yield run_check("namespace", _check_namespace, profile, cluster, core)
    yield run_check("launcher", _check_launcher, profile.namespace, core)
    yield run_check("retries", _check_retries, home_of(profile, cluster, core), core)
    namespace = profile.namespace
    for secret, keys in profile.secrets().items():
        remedy = f"create it with the keys {', '.join(sorted(keys))}; see k8s/README.md"
        read = partial(core.read_namespaced_secret, secret, namespace)
        yield run_check(f"Secret {secret}", read_object, read, remedy, partial(_describe_keys, secret, keys))
    remedy = "correct service_account in the profile, or, if it is not Kubeflow's own, apply an overlay of k8s/"
    read = partial(core.read_namespaced_service_account, profile.service_account, namespace)
    yield run_check(f"service account {profile.service_account}", read_object, read, remedy)
    if bundle := profile.ca_bundle:
        remedy = f"create it with the certificates in the key {bundle.key}"
        read = partial(core.read_namespaced_config_map, bundle.config_map, namespace)
        describe = partial(_describe_keys, bundle.config_map, {bundle.key})
        yield run_check(f"ConfigMap {bundle.config_map}", read_object, read, remedy, describe)


def image_of(profile: Profile, variant: str) -> str:
    """The container image `data` or `trainer` that a run uses."""
    named = profile.images.data if variant == "data" else profile.images.trainer
    return named or container_images.chosen(_IMAGES[variant])


def check_images(profile: Profile) -> str:
    """Whether nodes can get the container images; an image without a registry must be on them already.

    Raises:
        SkippedError: It names no registry, and what the nodes have cannot be seen from here.
        UserError: It names no registry, and no node has it.
    """
    images = [image_of(profile, variant) for variant in _IMAGES]
    local = [image for image in images if image.startswith(f"{environment.REGISTRY.default}/")]
    if not local:
        return " and ".join(images)
    unnamed = f"{' and '.join(local)} {'name' if len(local) > 1 else 'names'} no registry"
    remedy = (
        f"`make images push REGISTRY=…` and name that registry by --registry or {environment.REGISTRY}, or name them "
        "in `images` of the profile"
    )
    on_nodes = _images_of_nodes()
    if not on_nodes:
        raise SkippedError(f"{unnamed}, so your nodes must have them already; else {remedy}")
    if missing := [image for image in local if not any(f"/{name}".endswith(f"/{image}") for name in on_nodes)]:
        raise UserError(f"{unnamed}, and no node has {' or '.join(missing)}; {remedy}.")
    return f"{unnamed}, and nodes have them"


def _images_of_nodes() -> set[str]:
    """Names of the container images on nodes, of each node's fifty largest; empty if they cannot be seen from here."""
    client = kubernetes_client()
    if client is None:
        return set()
    try:
        nodes = call_kubernetes("list nodes", kubernetes.client.CoreV1Api(client).list_node)
    except (AccessError, RetryableError):
        return set()
    images = [image for node in (nodes.items if nodes else []) for image in node.status.images or []]
    return {name for image in images for name in image.names or []}


def home_of(profile: Profile, cluster: Cluster | None, core: kubernetes.client.CoreV1Api) -> str | None:
    """The namespace in which Kubeflow Pipelines itself is installed; None if it is not known."""
    for address in (cluster.endpoint if cluster else "", profile.kubeflow_pipelines.endpoint):
        if service := service_of(address):
            return service[1]
    for namespace in (profile.namespace, _STOCK_NAMESPACE):
        try:
            read = core.read_namespaced_service
            if call_kubernetes(f"read Services in {namespace}", read, _API_SERVICE, namespace):
                return namespace
        except (AccessError, RetryableError):
            continue
    return None


def _check_namespace(profile: Profile, cluster: Cluster | None, core: kubernetes.client.CoreV1Api) -> str:
    """Whether runs are created in the profile's namespace: a server with one user has only its own."""
    namespace = profile.namespace
    if cluster is None:
        raise SkippedError("Kubeflow Pipelines does not answer, so it is not known where it creates runs")
    if cluster.namespace is None:
        home = home_of(profile, cluster, core)
        if home is None:
            raise SkippedError("the server has one user and its own namespace, which could not be found out from here")
        if home != namespace:
            raise UserError(
                f"the server has one user, so runs are created in {home}, its own namespace, and not in {namespace}: "
                f"use --profile kubeflow, or set namespace {home} in the profile, with a service account of {home} "
                "(pipeline-runner)."
            )
        return f"runs are created in {home}, the server's own"
    remedy = f"create a Kubeflow Profile {namespace} (k8s/README.md), or give --namespace with yours"
    read = partial(core.read_namespace, namespace)
    return read_object(read, remedy, partial(_describe_namespace, namespace))


def _describe_namespace(namespace: str, answer: Any) -> str:
    labels = answer.metadata.labels or {}
    missing = [f"{key}={value}" for key, value in _PROFILE_LABELS.items() if labels.get(key) != value]
    if missing:
        raise UserError(
            f"{namespace} is no Kubeflow Profile's: it lacks the label {' and '.join(missing)}, without which "
            "Kubeflow's object store and metadata let no pod of it in; create a Profile (k8s/README.md)."
        )
    return f"runs are created in {namespace}, a Kubeflow Profile's"


def _check_launcher(namespace: str, core: kubernetes.client.CoreV1Api) -> str:
    """Whether KFP's launcher finds keys for the artifacts: in its Secret, unless its ConfigMap names others."""
    what = f"read ConfigMap {LAUNCHER} in {namespace}"
    try:
        config = call_kubernetes(what, core.read_namespaced_config_map, LAUNCHER, namespace)
    except AccessError as error:
        raise SkippedError(str(error)) from error
    data = (config.data if config else None) or {}
    root = data.get("defaultPipelineRoot") or "KFP's own"
    if data.get("providers"):
        return f"{LAUNCHER} names its own keys; pipeline root: {root}"
    remedy = "Kubeflow creates it in its own namespace and in each Profile's; ask the administrator"
    read = partial(core.read_namespaced_secret, _LAUNCHERS_SECRET, namespace)
    try:
        found = read_object(read, remedy, partial(_describe_keys, _LAUNCHERS_SECRET, _LAUNCHERS_KEYS))
    except UserError as error:
        raise UserError(f"Secret {_LAUNCHERS_SECRET}: {error}") from error
    return f"Secret {_LAUNCHERS_SECRET} {found}; pipeline root: {root}"


def _describe_keys(name: str, keys: set[str], answer: Any) -> str:
    """A sentence about a Secret or ConfigMap that has all these keys.

    Raises:
        UserError: One is missing.
    """
    missing = keys - set(answer.data or {})
    if missing:
        raise UserError(f"{name} lacks the keys {', '.join(sorted(missing))}; add them.")
    return f"found, with {', '.join(sorted(keys))}"


def _check_retries(home: str | None, core: kubernetes.client.CoreV1Api) -> str:
    """What the controller repeats; a profile's `retry` has no say in that."""
    if home is None:
        raise SkippedError("it is not known where Kubeflow Pipelines is installed")
    read = partial(core.read_namespaced_config_map, _CONTROLLER, home)
    return read_object(read, f"Argo's controller in {home} is configured elsewhere", _describe_retries)


def _describe_retries(answer: Any) -> str:
    try:
        defaults = yaml.safe_load((answer.data or {}).get("workflowDefaults") or "{}") or {}
        policy = defaults["spec"]["templateDefaults"]["retryStrategy"]["retryPolicy"]
    except (yaml.YAMLError, KeyError, TypeError):
        policy = ""
    if policy in ("OnError", "OnTransientError"):
        return f"{policy}: Argo repeats lost pods only; a step repeats its temporary faults itself"
    shown = policy or "the default of Argo"
    return f"{shown}: Argo may also repeat a step that failed; a mistake ends again at once, with the same sentence"
