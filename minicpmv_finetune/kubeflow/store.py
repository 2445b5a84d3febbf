"""The object store of a profile, as this process reaches it: its address, its keys, and the pipeline root in it.

Variables of the environment (`AWS_*`) have priority. Without them the keys come from the Secret that the profile
names, and an address inside the cluster is reached through a port-forward; both need a kubeconfig, or run in a pod.
"""

import base64
import os
import re

import kfp_server_api
import kubernetes

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import AccessError, UserError

from .forwarding import reachable
from .kubernetes_access import call_kubernetes, kubernetes_client
from .profile import Profile, SecretEnvironment
from .run_steps import workflow_name

LAUNCHER = "kfp-launcher"
RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Id of a run, which is also the name of its folder."""
_STOCK_ROOT = "minio://mlpipeline/v2/artifacts"  # KFP's own, where neither profile nor kfp-launcher names one
_ADDRESSES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_KEYS = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
)


def use_store(profile: Profile) -> None:
    """Make this process use the profile's object store, unless the environment names another one, or other keys.

    Raises:
        AccessError: Kubernetes refuses the port-forward.
        UserError: The store's Service has no running pod.
        RetryableError: Kubernetes does not answer.
    """
    os.environ.setdefault("AWS_DEFAULT_REGION", profile.s3.region)
    if profile.s3.endpoint and not _is_set(_ADDRESSES):
        os.environ["AWS_ENDPOINT_URL"] = reachable(profile.s3.endpoint)
    if not _is_set(_KEYS):
        os.environ.update(read_keys(profile))


def _is_set(names: tuple[str, ...]) -> bool:
    return any(environment.Variable(name, "read by boto3").read() for name in names)


def read_keys(profile: Profile) -> dict[str, str]:
    """The variables that the store's Secret becomes in a pod; empty where this user cannot read the Secret."""
    return read_variables(profile, profile.s3)


def read_variables(profile: Profile, named: SecretEnvironment) -> dict[str, str]:
    """The variables that a Secret becomes in a pod; empty where this user cannot read the Secret."""
    client = kubernetes_client()
    if client is None:
        return {}
    core = kubernetes.client.CoreV1Api(client)
    secret, namespace = named.secret, profile.namespace
    try:
        found = call_kubernetes(f"read Secret {secret}", core.read_namespaced_secret, secret, namespace)
    except AccessError:
        return {}
    data = (found.data if found else None) or {}
    return {
        variable: base64.b64decode(data[key]).decode() for key, variable in named.variables.items() if data.get(key)
    }


def pipeline_root(profile: Profile) -> str:
    """The folder in which the server stores the artifacts of the profile's runs, as an `s3://` URI.

    It is the profile's, else the one that the namespace's ConfigMap kfp-launcher names, else KFP's own.

    Raises:
        AccessError: The ConfigMap cannot be read from here.
        UserError: It names a place that is no S3-compatible store.
        RetryableError: Kubernetes does not answer.
    """
    root = profile.pipeline_root or _root_of_launcher(profile.namespace) or _STOCK_ROOT
    if not storage.is_object_uri(root):
        raise UserError(f"pipeline root {root}: is not in an S3-compatible store; set pipeline_root in the profile.")
    return f"s3://{root.partition('://')[2].rstrip('/')}"


def run_folder(profile: Profile, run: kfp_server_api.V2beta1Run) -> str:
    """The folder of a run that has begun, which Kubeflow names by pipeline and run; each step has a folder in it.

    Raises:
        AccessError, UserError, RetryableError: See `pipeline_root`.
    """
    root = (run.runtime_config.pipeline_root if run.runtime_config else "") or pipeline_root(profile)
    # The Workflow's name is the pipeline's, and five characters.
    pipeline = workflow_name(run).rpartition("-")[0]
    return storage.join(root, f"{pipeline}/{run.run_id}")


def _root_of_launcher(namespace: str) -> str:
    client = kubernetes_client()
    if client is None:
        raise AccessError(
            f"the profile has no pipeline_root, and without a kubeconfig the ConfigMap {LAUNCHER} in {namespace} "
            "cannot be read; set KUBECONFIG, or pipeline_root in the profile."
        )
    core = kubernetes.client.CoreV1Api(client)
    found = call_kubernetes(
        f"read ConfigMap {LAUNCHER} in {namespace}", core.read_namespaced_config_map, LAUNCHER, namespace
    )
    return str(((found.data if found else None) or {}).get("defaultPipelineRoot") or "")
