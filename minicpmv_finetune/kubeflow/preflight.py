"""Look before a run: is everything there that it needs, a line each, with what to do where it is not.

The checks run where the command runs, with its credentials. What cannot be seen from there, such as Secrets without
access to Kubernetes, is said to be skipped, and is no failure.
"""

import base64
import http.client
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RETRY_EXIT, USER_ERROR_EXIT, RetryableError, UserError, without_password

if TYPE_CHECKING:
    from .profile import Profile

State = Literal["ok", "skipped", "failed", "unreachable"]
_MARKS = {"ok": "ok     ", "skipped": "skipped", "failed": "FAILED ", "unreachable": "FAILED "}
_OLDEST_KUBEFLOW = (2, 17)
_STEPS = "minicpmv_finetune.components"
_DATA_MODULES = ("numpy", "pyarrow", "boto3", "mlflow", "kfp.dsl", f"{_STEPS}.validate_data.validate")
_TRAINER_MODULES = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "deepspeed"),
    *(f"{_STEPS}.{step}" for step in ("preprocess.preprocess", "train.finetune", "merge.merge", "evaluate.evaluate")),
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `unreachable` may be gone next time, `failed` is for somebody to mend."""

    name: str
    state: State
    detail: str

    def line(self) -> str:
        """For a person."""
        return f"{_MARKS[self.state]} {self.name}: {self.detail}"


class _SkippedError(Exception):
    """This cannot be seen from here."""


def exit_code(checks: list[Check]) -> int:
    """The exit code: 0 if nothing failed, 2 if something is to be mended, 75 if something did not answer."""
    states = {check.state for check in checks}
    if "failed" in states:
        return USER_ERROR_EXIT
    return RETRY_EXIT if "unreachable" in states else 0


def check_cluster(profile: "Profile", data: str = "", base_model: str = "") -> list[Check]:
    """Everything that a run with this profile needs.

    Args:
        profile: the cluster's settings.
        data: training data to look at; empty leaves it out.
        base_model: base checkpoint to look at; empty leaves it out.
    """
    from .profile import use_storage

    use_storage(profile)
    checks = [
        _check("Kubeflow Pipelines", lambda: _kubeflow(profile)),
        _check("object storage", lambda: _object_storage(profile)),
        _check("MLflow", lambda: _mlflow(profile)),
        *(
            _check(f"shared memory of {step}", lambda step=step: _shared_memory(profile, step))
            for step in profile.steps
        ),
        *_kubernetes(profile),
    ]
    if data:
        checks.append(_check("data", _data, data))
    if base_model:
        checks.append(_check("base model", _base_model, base_model, profile))
    return checks


def check_image() -> list[Check]:
    """Whether the image that this runs in can do its work, with no network and no GPU needed."""
    modules = list(_DATA_MODULES)
    is_trainer = importlib.util.find_spec("torch") is not None
    if is_trainer:
        modules += _TRAINER_MODULES
    checks = [
        _check("Python", platform.python_version),
        _check("package", version, "minicpmv-finetune"),
        _check("user", _user),
        _check("temporary folder", _temporary_folder),
        *(_check(f"import {name}", _imported, name) for name in modules),
    ]
    if is_trainer:
        checks += [_check("compiler", _compiler), _check("GPU", _gpu)]
    return checks


def _check(name: str, look: Callable[..., str], *arguments: Any) -> Check:
    try:
        return Check(name, "ok", without_password(look(*arguments)))
    except _SkippedError as error:
        return Check(name, "skipped", without_password(str(error)))
    except UserError as error:
        return Check(name, "failed", str(error))
    except RetryableError as error:
        return Check(name, "unreachable", str(error))


def _kubeflow(profile: "Profile") -> str:
    from minicpmv_finetune.pipelines.finetuning import FINETUNE

    from .client import connect

    cluster = connect(profile)
    health = cluster.call(cluster.client.healthzs.healthz_service_get_healthz, _preload_content=False)
    said = json.loads(health.data)
    release = str(said.get("tag_name") or "unknown")
    if (match := re.match(r"v?(\d+)\.(\d+)", release)) and (int(match[1]), int(match[2])) < _OLDEST_KUBEFLOW:
        raise UserError(f"{cluster.endpoint} is version {release}; 2.17 or newer is needed, so upgrade it.")
    is_there = cluster.pipeline_id(FINETUNE.name) is not None
    users = "several users" if cluster.namespace else "one user"
    return f"{cluster.endpoint}, version {release}, {users}, pipeline {'there' if is_there else 'not uploaded yet'}"


def _object_storage(profile: "Profile") -> str:
    root = profile.pipeline_root
    if not root:
        raise _SkippedError("the profile names no pipeline_root, so which bucket to try is not known")
    uri, content = storage.join(root, f".preflight-{uuid.uuid4()}"), os.urandom(64)
    storage.write_bytes(uri, content)
    try:
        if storage.read_bytes(uri) != content:
            raise UserError(f"{uri}: something else was read than written; check the store.")
    finally:
        storage.remove_file(uri)
    return f"wrote, read back and deleted an object in {root}"


def _mlflow(profile: "Profile") -> str:
    uri = environment.TRACKING_URI.read() or profile.mlflow.tracking_uri
    if not uri.startswith(("http://", "https://")):
        raise _SkippedError(f"{uri} is no server")
    try:
        with urllib.request.urlopen(_request(f"{uri.rstrip('/')}/version"), timeout=10) as answer:  # noqa: S310
            return f"{uri}, version {answer.read(100).decode(errors='replace').strip()}"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{uri}: lets nobody in ({error.code}); name its credentials in the profile, and this host in "
                "MLFLOW_SERVER_ALLOWED_HOSTS of the server."
            ) from error
        raise RetryableError(f"{uri}: answered {error.code}; try again.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RetryableError(
            f"{uri}: MLflow does not answer ({error}); set {environment.TRACKING_URI} to reach it."
        ) from error


def _request(address: str) -> urllib.request.Request:
    """A request to an http(s) address; urllib cannot connect to an address that contains a user and password."""
    parts = urllib.parse.urlsplit(address)
    request = urllib.request.Request(without_password(address))  # noqa: S310 - the caller has checked the scheme
    if parts.username is not None:
        credentials = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    return request


def _shared_memory(profile: "Profile", step: str) -> str:
    from kubernetes.utils.quantity import parse_quantity

    task = profile.steps[step]
    if task.shared_memory is None:
        if task.accelerator:
            raise UserError(f"steps.{step}.shared_memory: none, and 64 MB end in a bus error; set it to 8Gi or more.")
        raise _SkippedError("not needed without a GPU")
    if parse_quantity(task.shared_memory) >= parse_quantity(task.memory[1]):
        raise UserError(
            f"steps.{step}.shared_memory: {task.shared_memory} of a memory limit of {task.memory[1]} leaves nothing; "
            "raise the limit."
        )
    return f"{task.shared_memory} of {task.memory[1]}"


def _kubernetes(profile: "Profile") -> Iterator[Check]:
    """What the profile names in the namespace: Secrets and their keys, claims, nodes with GPUs, queues, the runtime."""
    import kubernetes

    try:
        if environment.KUBERNETES_HOST.read():
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config(environment.KUBECONFIG.read() or None)
    except kubernetes.config.ConfigException:
        yield Check("Kubernetes", "skipped", "no kubeconfig here; Secrets, GPUs, queues and the runtime are not seen")
        return
    core, custom, space = kubernetes.client.CoreV1Api(), kubernetes.client.CustomObjectsApi(), profile.namespace
    overlay = "apply an overlay of k8s/"
    for secret, keys in profile.secrets().items():
        remedy = f"create it with the keys {', '.join(sorted(keys))}; see k8s/README.md"
        look = partial(core.read_namespaced_secret, secret, space)
        yield _check(f"Secret {secret}", _asked, look, remedy, partial(_keys, secret, keys))
    look = partial(core.read_namespaced_service_account, profile.service_account, space)
    yield _check(f"service account {profile.service_account}", _asked, look, overlay, _there)
    if profile.base_models:
        look = partial(core.read_namespaced_persistent_volume_claim, profile.base_models.claim, space)
        yield _check(f"claim {profile.base_models.claim}", _asked, look, overlay, _there)
    for step, task in profile.steps.items():
        if task.accelerator:
            selector = ",".join(f"{key}={value}" for key, value in task.node_selector.items())
            look, describe = partial(core.list_node, label_selector=selector), partial(_gpus, task, selector)
            yield _check(f"GPUs of {step}", _asked, look, "ask for the right to list nodes", describe)
        if task.queue:
            kind = ("kueue.x-k8s.io", "v1beta1", space, "localqueues", task.queue)
            remedy = "apply k8s/components/kueue, or take the queue out of the profile"
            look = partial(custom.get_namespaced_custom_object, *kind)
            yield _check(f"queue of {step}", _asked, look, remedy, _there)
    if profile.runtime:
        kind = ("trainer.kubeflow.org", "v1alpha1", space, "trainingruntimes", profile.runtime)
        remedy = "apply k8s/components/trainer, or take the runtime out of the profile"
        look = partial(custom.get_namespaced_custom_object, *kind)
        yield _check(f"training runtime {profile.runtime}", _asked, look, remedy, _there)


def _asked(look: Callable[..., Any], remedy: str, describe: Callable[[Any], str]) -> str:
    """Ask Kubernetes, and describe what it answers."""
    import kubernetes
    import urllib3

    try:
        return describe(look(_request_timeout=10))
    except kubernetes.client.ApiException as error:
        if error.status == 404:
            raise UserError(f"not there; {remedy}.") from error
        if error.status in (401, 403):
            raise _SkippedError(f"not allowed to look ({error.status})") from error
        raise RetryableError(f"Kubernetes answered {error.status}; try again.") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise RetryableError(f"Kubernetes does not answer ({type(error).__name__}); try again.") from error


def _there(found: Any) -> str:
    return "there"


def _keys(secret: str, keys: set[str], found: Any) -> str:
    missing = keys - set(found.data or {})
    if missing:
        raise UserError(f"{secret} lacks the keys {', '.join(sorted(missing))}; add them.")
    return f"there, with {', '.join(sorted(keys))}"


def _gpus(task: Any, selector: str, found: Any) -> str:
    resource, wanted = task.accelerator.resource, task.accelerator.count
    counts = [int((node.status.allocatable or {}).get(resource, "0")) for node in found.items]
    fitting = sum(count >= wanted for count in counts)
    if not fitting:
        raise UserError(
            f"no node with {selector or 'any label'} offers {wanted} {resource} (at most {max(counts, default=0)}); "
            "correct node_selector or count in the profile."
        )
    return f"{fitting} nodes offer {wanted} {resource}"


def _data(uri: str) -> str:
    files = storage.expand(uri)
    for file in files:
        storage.read_bytes(file, (0, 1))
    return f"{len(files)} readable file{'s' if len(files) > 1 else ''} at {uri}"


def _base_model(uri: str, profile: "Profile") -> str:
    from .submit import pin_base_model

    if profile.base_models and uri.startswith(profile.base_models.mount):
        raise _SkippedError(f"{uri} lies on the claim {profile.base_models.claim}, which only pods can see")
    if storage.is_object_uri(uri) or Path(uri).exists():
        if "config.json" not in storage.list_files(uri):
            raise UserError(f"{uri}: no config.json, so no checkpoint; check the URI.")
        return f"a checkpoint at {uri}"
    return str(pin_base_model({"base_model_uri": uri})["base_model_uri"])


def _user() -> str:
    if os.getuid() == 0:
        raise UserError("root; run the image as the user it was built for.")
    return f"{os.getuid()}:{os.getgid()}"


def _temporary_folder() -> str:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); mount a volume and set TMPDIR.") from error
    return tempfile.gettempdir()


def _imported(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        # Whatever breaks an import, the image is not fit for use.
        raise UserError(f"{type(error).__name__}: {error!s:.200}; build the image anew.") from error
    return str(getattr(module, "__version__", "there"))


def _compiler() -> str:
    found = shutil.which(environment.C_COMPILER.read())
    if not found:
        raise UserError("none, and DeepSpeed, Triton and inductor compile at run time; install gcc.")
    return found


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise _SkippedError(f"none here; built for CUDA {torch.version.cuda}, Python {sys.version_info.major}")
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
