"""What a Kubeflow needs before the first run: find out what is missing, and apply what this program brings along.

Kubeflow itself, a Profile's namespace and its keys are the administrator's. This program brings MLflow, for one
namespace of runs; `manifests/mlflow.yaml` is what `kubectl kustomize k8s/stock` makes.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes
import yaml

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import UserError

from .checks import Check, run_check
from .client import Cluster
from .installation import check_images, check_installation, image_of
from .kubernetes_access import call_kubernetes, kubernetes_client
from .preflight import check_kubeflow
from .profile import Profile
from .store import pipeline_root

TOKEN_AUDIENCE = "pipelines.kubeflow.org"  # the only one that a stock server with several users accepts
_MLFLOW_MANIFEST = Path(__file__).with_name("manifests") / "mlflow.yaml"
_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps/{name}",
    "PersistentVolumeClaim": "/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}",
    "Service": "/api/v1/namespaces/{namespace}/services/{name}",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments/{name}",
}


@dataclass(frozen=True)
class Setup:
    """What `setup` found.

    Attributes:
        checks: What is there, and what is missing.
        settings: Shell commands that set what the other commands need.
    """

    checks: tuple[Check, ...]
    settings: tuple[str, ...]


def set_up(profile: Profile, named: str, apply: bool) -> Setup:
    """Check what a first run needs, and apply what is missing.

    Args:
        profile: Settings of the cluster.
        named: Name or path of the profile, as the user gave it.
        apply: Whether to apply what this program brings along, if it is missing.

    Raises:
        UserError: Kubernetes cannot be reached from here.
    """
    client = kubernetes_client()
    if client is None:
        raise UserError("setup: no kubeconfig here; set KUBECONFIG, or run it in a Kubeflow notebook.")
    servers: list[Cluster] = []
    checks = [run_check("Kubeflow Pipelines", check_kubeflow, profile, servers)]
    server = servers[0] if servers else None
    checks += check_installation(profile, server, kubernetes.client.CoreV1Api(client))
    checks.append(run_check("container images", check_images, profile))
    checks.append(run_check("MLflow", _check_mlflow, profile, client, apply))
    return Setup(tuple(checks), tuple(_settings(profile, named, server)))


def _check_mlflow(profile: Profile, client: kubernetes.client.ApiClient, apply: bool) -> str:
    """Whether there is an MLflow for the runs; applies one if there is none.

    Raises:
        UserError: There is none, and none is to be applied.
    """
    service, own = f"mlflow in {profile.namespace}", own_tracking_uri(profile)
    if profile.mlflow and profile.mlflow.tracking_uri != own:
        return f"the profile names {profile.mlflow.tracking_uri}"
    core = kubernetes.client.CoreV1Api(client)
    read = core.read_namespaced_service
    if call_kubernetes(f"read Service {service}", read, "mlflow", profile.namespace) is not None:
        return f"found at {own}"
    if not apply:
        raise UserError(
            f"there is no Service {service}, so nothing would be registered; `minicpmv-finetune setup --apply` applies "
            "one from the image data, or name yours as mlflow.tracking_uri in the profile."
        )
    for item in mlflow_objects(profile):
        _apply(client, profile.namespace, item)
    return f"applied, from the image {image_of(profile, 'data')}; it will answer at {own}"


def own_tracking_uri(profile: Profile) -> str:
    """The address of the MLflow that this program applies, as the run's pods reach it."""
    return f"http://mlflow.{profile.namespace}:5000"


def mlflow_objects(profile: Profile) -> list[dict[str, Any]]:
    """The objects of an MLflow for the profile's namespace, with the image, the store and the keys of its runs."""
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(_MLFLOW_MANIFEST.read_text()))
    by_kind = {item["kind"]: item for item in objects}
    by_kind["ConfigMap"]["data"] = {"AWS_DEFAULT_REGION": profile.s3.region}
    if profile.s3.endpoint:
        by_kind["ConfigMap"]["data"]["MLFLOW_S3_ENDPOINT_URL"] = profile.s3.endpoint
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    container["image"] = image_of(profile, "data")
    own: list[dict[str, Any]] = [
        {"name": "MLFLOW_ARTIFACTS_DESTINATION", "value": storage.join(pipeline_root(profile), "minicpmv-mlflow")},
        *(
            {"name": variable, "valueFrom": {"secretKeyRef": {"name": profile.s3.secret, "key": key}}}
            for key, variable in profile.s3.variables.items()
        ),
    ]
    replaced = {*(item["name"] for item in own), "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    container["env"] = [item for item in container["env"] if item["name"] not in replaced] + own
    container["envFrom"] = [{"configMapRef": {"name": by_kind["ConfigMap"]["metadata"]["name"]}}]
    if profile.images.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in profile.images.pull_secrets]
    return objects


def _apply(client: kubernetes.client.ApiClient, namespace: str, item: dict[str, Any]) -> None:
    """Create an object, or bring it up to date, as `kubectl apply --server-side` does."""
    kind, name = item["kind"], item["metadata"]["name"]
    call_kubernetes(
        f"apply {kind} {name} in {namespace}",
        client.call_api,
        _PATHS[kind].format(namespace=namespace, name=name),
        "PATCH",
        query_params=[("fieldManager", "minicpmv-finetune"), ("force", "true")],
        header_params={"Content-Type": "application/apply-patch+yaml", "Accept": "application/json"},
        body=item,  # sent as JSON, which is YAML too
        auth_settings=["BearerToken"],
        _preload_content=False,
    )


def _settings(profile: Profile, named: str, cluster: Cluster | None) -> Iterator[str]:
    """The commands that let the other commands use this profile, registry, MLflow and token."""
    variables = {environment.PROFILE.name: named, environment.NAMESPACE.name: profile.namespace}
    registry = image_of(profile, "data").rpartition("/")[0]
    if registry != environment.REGISTRY.default:
        variables[environment.REGISTRY.name] = registry
    if profile.mlflow is None:
        variables[environment.MLFLOW.name] = own_tracking_uri(profile)
    yield f"export {' '.join(f'{name}={shlex.quote(value)}' for name, value in variables.items() if value)}"
    if cluster and cluster.namespace and not Path(environment.KFP_TOKEN_FILE.read()).is_file():
        yield f'export {environment.KFP_TOKEN}="$({token_command(profile)})"'


def token_command(profile: Profile) -> str:
    """The command that prints a token with which a server with several users knows the profile's service account."""
    return (
        f"kubectl -n {profile.namespace} create token {profile.service_account} --audience {TOKEN_AUDIENCE} "
        "--duration 24h"
    )
