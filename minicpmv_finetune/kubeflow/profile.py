"""The settings of one cluster, in one file.

The pipeline itself contains nothing about nodes, secrets or limits. A profile does, and `with_profile` applies its
settings to every task: user, resources, time limit and credentials. The result is an ordinary pipeline, so the
Kubeflow UI, the SDK and schedules need no support for profiles.

Two profiles are part of the package (`profiles/`), for stock installations of Kubeflow with one user and with several:
`kubeflow`, which is used where none is named, and `kubeflow-profile`. Others are files, like `k8s/profiles/dev.yaml`.

A profile names Secrets and never contains their values: their keys become environment variables of the containers.
"""

import difflib
import re
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

from kfp import dsl, kubernetes
from kfp.dsl import pipeline_context
from kfp.dsl.graph_component import GraphComponent
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from minicpmv_finetune import container_images, environment
from minicpmv_finetune.attempts import NO_RETRY
from minicpmv_finetune.errors import UserError, describe_validation_error, without_password
from minicpmv_finetune.kubernetes_terms import QUEUE_LABEL
from minicpmv_finetune.pipelines import all_pipelines
from minicpmv_finetune.pipelines.pipeline import copy_choices
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.yaml_files import read_mapping

from .kubernetes_access import own_namespace

CA_FOLDER = "/etc/minicpmv-ca"
"""Where pods, and the nodes of k8s/components/trainer, find the certificates of a profile's ConfigMap."""
SHIPPED = ("kubeflow", "kubeflow-profile")
"""Names of the profiles in the package: for stock installations of Kubeflow with one user, and with several."""
DEFAULT_PROFILE = "kubeflow"
_RESERVED = (
    *("bin", "dev", "etc", "lib", "opt", "proc", "sbin", "sys", "tmp", "usr", "var", "scratch"),
    *("gcs", "kfp", "minio", "oci", "s3"),
)
"""Folders of a container that no volume may hide: the system's, this project's, and those of Kubeflow's launcher."""
_SHIPPED = Path(__file__).with_name("profiles")
_PLAIN = "without_profile"  # attribute of a pipeline's function with the function that a profile was applied to


def _require_pinned(image: str) -> str:
    if not re.search(r"(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})$", image) or image.endswith(":latest"):
        raise ValueError("a container image needs a digest (…@sha256:…) or a tag other than latest")
    return image


# After every end of a pod, a mistake's too, Argo waits so long before it looks whether to start another one.
_LOST_POD_BACKOFF = 5
_LOST_POD_FACTOR = 2

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGTPE]i?)?$")]
ContainerImage = Annotated[str, AfterValidator(_require_pinned)]
Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Section):
    """The two container images, by digest or an explicit tag; `latest` is refused.

    One that is not named here is this version's image in the registry that `--registry` or the environment names.
    """

    data: ContainerImage | None = None
    trainer: ContainerImage | None = None
    pull_secrets: tuple[Name, ...] = ()


class Identity(_Section):
    """User and group of the containers, for which the container images are built; never root."""

    user: int = Field(default=1000, ge=1)
    group: int = Field(default=1000, ge=1)


class Retry(_Section):
    """Attempts after a failed one, and how long a step waits before each.

    A step waits itself after a fault: first `backoff`, then `factor` times as long, at most `longest_wait`. Argo makes
    as many attempts for pods that are lost, and waits only seconds, because it waits after a mistake too.
    """

    attempts: int = Field(default=3, ge=0, le=10)
    backoff: str = Field(default="60s", pattern=r"^\d+s$")
    factor: float = Field(default=2.0, ge=1)
    longest_wait: str = Field(
        default="1800s",
        pattern=r"^\d+s$",
        # Its name in 0.1.0, which wrote it where Argo reads how long all attempts may take together.
        validation_alias=AliasChoices("longest_wait", "longest_backoff"),
    )

    def waits(self) -> list[float]:
        """Seconds that a step waits before its second attempt, its third, and so on."""
        first, longest = (float(text.removesuffix("s")) for text in (self.backoff, self.longest_wait))
        return [min(first * self.factor**number, longest) for number in range(self.attempts)]

    def longest_duration(self, timeout_seconds: int) -> int:
        """Seconds after which Argo may give a step up: when every attempt has used its whole time, and never before.

        Argo counts from the start of the first attempt, and ends a running attempt too.
        """
        waits = sum(_LOST_POD_BACKOFF * _LOST_POD_FACTOR**number for number in range(self.attempts))
        return (self.attempts + 1) * timeout_seconds + int(waits)


class SecretEnvironment(_Section):
    """A Secret in the run's namespace, and its keys with the environment variables that they become."""

    secret: Name
    variables: dict[str, str] = Field(min_length=1)


class S3(SecretEnvironment):
    """Object storage: its address, and the Secret with its credentials."""

    endpoint: str = Field(default="", description="Address of the store; empty means the provider's own.")
    region: str = "us-east-1"
    variables: dict[str, str] = {
        "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    }


class MLflow(_Section):
    """The tracking server, and the Secret with its credentials if it requires any."""

    tracking_uri: str
    ui_endpoint: str = Field(default="", description="Address at which people open it, for links.")
    experiment: str = "minicpmv-finetune"
    credentials: SecretEnvironment | None = None


class KubeflowPipelines(_Section):
    """The API server; `KF_PIPELINES_ENDPOINT` and `KF_PIPELINES_UI_ENDPOINT` in the environment have priority."""

    endpoint: str = ""
    ui_endpoint: str = ""
    time_zone: str = Field(
        default="UTC", description="Time zone in which the server reads schedules (CRON_SCHEDULE_TIMEZONE)."
    )

    def ui_address(self) -> str:
        """Where people open the UI, without a password; empty if neither environment nor profile says it."""
        return without_password(environment.KFP_UI_ENDPOINT.read() or self.ui_endpoint)


class Accelerator(_Section):
    """Devices of a task, by the name of the cluster's resource."""

    resource: str = "nvidia.com/gpu"
    count: int = Field(default=1, ge=1)


class Toleration(_Section):
    """A taint that a task's pod tolerates."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] = "NoSchedule"


class Scratch(_Section):
    """Disk for downloads and temporary files: the node's own, or a volume of a storage class while the task runs.

    Kubeflow cannot set a pod's `fsGroup`, so the storage class must provide volumes that any user may write to.
    """

    size: Quantity
    storage_class: str | None = Field(default=None, description="Storage class; none uses the node's own disk.")


class StepSettings(_Section):
    """The settings of one step: resources, time limit, volumes and nodes."""

    cpu: tuple[Quantity, Quantity] = Field(description="Request and limit.")
    memory: tuple[Quantity, Quantity] = Field(description="Request and limit; shared memory counts as memory.")
    timeout_seconds: int = Field(ge=60)
    scratch: Scratch
    shared_memory: Quantity | None = Field(
        default=None, description="Size of /dev/shm; without it the container runtime's 64 MB."
    )
    accelerator: Accelerator | None = None
    tolerations: tuple[Toleration, ...] = ()
    node_selector: dict[str, str] = {}
    queue: Name | None = Field(default=None, description="Kueue LocalQueue that admits the task.")


class ModelVolume(_Section):
    """A persistent volume claim with base models, from which `base_model_uri: /models/NAME` is read."""

    claim: Name
    mount: str = Field(default="/models", pattern=r"^/[^/]")


class DataVolume(_Section):
    """A persistent volume claim that every step mounts, so that a path below `mount` is an address of data."""

    claim: Name
    mount: str = Field(pattern=r"^/[^/]")


class Hub(_Section):
    """The model hub: the Secret with its token, and the address of a mirror."""

    secret: Name | None = None
    variables: dict[str, str] = {"HF_TOKEN": "HF_TOKEN"}
    endpoint: str = Field(default="", pattern=r"^(https?://.+)?$")


class Proxy(_Section):
    """The way out of the cluster; what is inside it is always reached without."""

    http: str = Field(default="", pattern=r"^(https?://.+)?$")
    https: str = Field(default="", pattern=r"^(https?://.+)?$")
    bypass: tuple[str, ...] = Field(default=(), description="Further hosts that are reached without it.")


class CaBundle(_Section):
    """A ConfigMap with the certificates that are trusted, in place of the public ones."""

    config_map: Name
    key: str = Field(default="ca.crt", pattern=r"^[-._a-zA-Z0-9]+$")


class Profile(_Section):
    """The settings of one cluster."""

    schema_version: Literal[1] = Field(default=1, description="Version of this format.")
    name: str = ""
    namespace: Name
    service_account: Name
    kubeflow_pipelines: KubeflowPipelines = KubeflowPipelines()
    pipeline_root: str = Field(
        default="", description="Folder for artifacts; empty leaves the choice to the namespace's kfp-launcher."
    )
    images: Images = Images()
    identity: Identity = Identity()
    labels: dict[str, Label] = {}
    retry: Retry = Retry()
    s3: S3
    mlflow: MLflow | None = Field(
        default=None, description="Tracking and model registry; without it the gate decides, and nothing is registered."
    )
    base_models: ModelVolume | None = None
    volumes: tuple[DataVolume, ...] = Field(default=(), description="Claims with data, mounted by every step.")
    hub: Hub = Hub()
    proxy: Proxy = Proxy()
    ca_bundle: CaBundle | None = None
    allowed_uris: tuple[str, ...] = Field(
        default=(),
        description="Folders from which data and the images that it names may be read; none allows every place.",
    )
    runtime: Name | None = Field(default=None, description="TrainingRuntime for training on several nodes.")
    train_on_nodes: bool = Field(
        default=False,
        description="Whether one node is trained on there too, so that the pod of train only starts and follows them.",
    )
    preprocess_partitions: int = Field(default=1, ge=1, description="Number of pods that share preprocess.")
    default: StepSettings = Field(description="Settings of every step without an entry in `steps`.")
    steps: dict[str, StepSettings] = {}

    @field_validator("steps")
    @classmethod
    def _known_steps(cls, steps: dict[str, StepSettings]) -> dict[str, StepSettings]:
        # Where several pods share preprocess, each part is a separate task.
        known = {step for pipeline in all_pipelines().values() for step in pipeline.steps} | {"preprocess-part"}
        for name in steps:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"no pipeline has a step {name!r}; {meant}the steps are {', '.join(sorted(known))}")
        return steps

    @model_validator(mode="after")
    def _fitting(self) -> "Profile":
        mounts, claims = ([getattr(volume, name) for volume in self._volumes()] for name in ("mount", "claim"))
        for mount in mounts:
            top = Path(mount).parts[1:2]
            if not top or ".." in Path(mount).parts or top[0] in _RESERVED:
                raise ValueError(f"volumes: {mount} belongs to the container or to Kubeflow; choose another folder")
            if mounts.count(mount) > 1:
                raise ValueError(f"volumes: {mount} is mounted twice; choose another folder")
        for claim in claims:
            if claims.count(claim) > 1:
                raise ValueError(f"volumes: the claim {claim} is named twice; a pod mounts a claim once")
        if self.train_on_nodes and not self.runtime:
            raise ValueError("train_on_nodes: there is no runtime; name the TrainingRuntime whose nodes train")
        return self

    def _volumes(self) -> list[ModelVolume | DataVolume]:
        return [*([self.base_models] if self.base_models else []), *self.volumes]

    def claims(self) -> list[str]:
        """Every persistent volume claim that a run mounts."""
        return sorted({volume.claim for volume in self._volumes()})

    def claim_of(self, path: str) -> str:
        """The claim that a path of a pod is on; empty if it is on none."""
        return next((volume.claim for volume in self._volumes() if Path(path).is_relative_to(volume.mount)), "")

    def step_settings(self, step: str) -> StepSettings:
        """The settings of a step."""
        return self.steps.get(step, self.default)

    def secrets(self) -> dict[str, set[str]]:
        """Every Secret that a run needs in its namespace, with the keys that it must contain."""
        needed = {self.s3.secret: set(self.s3.variables)}
        if self.mlflow and (credentials := self.mlflow.credentials):
            needed.setdefault(credentials.secret, set()).update(credentials.variables)
        if self.hub.secret:
            needed.setdefault(self.hub.secret, set()).update(self.hub.variables)
        return needed

    def with_gpus(self, count: int) -> "Profile":
        """The same profile with this number of GPUs for train; 0 lets every step run without a GPU, on any node.

        Raises:
            UserError: Train runs on the nodes of a TrainingRuntime, which has its own number.
        """
        if self.train_on_nodes:
            raise UserError(f"--gpus: train runs on nodes of TrainingRuntime {self.runtime}; change the number there.")
        settings = {"train": self.step_settings("train"), **self.steps}
        if count:
            resource = (settings["train"].accelerator or Accelerator()).resource
            accelerator = Accelerator(resource=resource, count=count)
            settings["train"] = settings["train"].model_copy(update={"accelerator": accelerator})
            return self.model_copy(update={"steps": settings})
        steps = {step: _without_gpu(found) for step, found in settings.items()}
        return self.model_copy(update={"default": _without_gpu(self.default), "steps": steps})

    def with_registry(self, registry: str) -> "Profile":
        """The same profile with this version's container images of a registry."""
        named = {variant: container_images.named(variant, registry) for variant in ("data", "trainer")}
        return self.model_copy(update={"images": self.images.model_copy(update=named)})


def _without_gpu(settings: StepSettings) -> StepSettings:
    """The settings for any node, if they ask for a GPU; else unchanged."""
    if settings.accelerator is None:
        return settings
    return settings.model_copy(update={"accelerator": None, "tolerations": (), "node_selector": {}})


def load_profile(profile: str | Path, namespace: str = "") -> Profile:
    """Read a profile.

    Args:
        profile: Name of a profile of the package, or path of a file.
        namespace: Namespace of the runs, in place of the profile's; `kubeflow-profile` in a notebook has the
            notebook's without it.

    Returns:
        The settings of the cluster.

    Raises:
        UserError: The file cannot be read, a field is unknown or has a wrong value, or no namespace is given.
    """
    path = _SHIPPED / f"{profile}.yaml" if str(profile) in SHIPPED else Path(profile)
    named = f"use one of {', '.join(SHIPPED)}, or a file; see k8s/README.md"
    content = read_mapping(path, "a profile's fields", named)
    if "mlflow" not in content and (tracking := environment.MLFLOW.read()):
        content["mlflow"] = {"tracking_uri": tracking}
    is_shipped = str(profile) in SHIPPED
    if namespace := namespace or (own_namespace() if is_shipped and "namespace" not in content else ""):
        content["namespace"] = namespace
    elif is_shipped and "namespace" not in content:
        raise UserError(
            f"profile {profile}: the namespace of your runs is not known; give --namespace NAME or set "
            f"{environment.NAMESPACE}."
        )
    try:
        return Profile.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise UserError(f"{profile}: {describe_validation_error(error, 'profile')}; see k8s/README.md.") from error


def chosen_profile(profile: str = "", namespace: str = "") -> Profile:
    """The profile with this name or path, else the one that the environment names, else `kubeflow`, which is said.

    Raises:
        UserError: See `load_profile`.
    """
    profile = profile or environment.PROFILE.read()
    namespace = namespace or environment.NAMESPACE.read()
    if not profile:
        print_sentence(
            f"No profile is named, so {DEFAULT_PROFILE} is used (Kubeflow Pipelines with one user); for several users "
            "give --profile kubeflow-profile --namespace NAME, for settings of your own a file.",
        )
    return load_profile(profile or DEFAULT_PROFILE, namespace)


def with_profile(pipeline: GraphComponent, profile: Profile) -> GraphComponent:
    """The same pipeline with a cluster's settings on each of its tasks, in place of those of another profile."""
    plain = getattr(pipeline.pipeline_func, _PLAIN, pipeline.pipeline_func)

    @wraps(plain)
    def build(*inputs: Any) -> Any:
        outputs = plain(*inputs)
        for name, task in pipeline_context.Pipeline.get_default_pipeline().tasks.items():
            # A task that is itself a pipeline has no container.
            if task.container_spec is not None:
                _apply(profile, name, task)
        return outputs

    setattr(build, _PLAIN, plain)
    info = pipeline.pipeline_spec.pipeline_info
    decorate = dsl.pipeline(name=info.name, display_name=info.display_name, description=info.description)
    configured: GraphComponent = decorate(build)
    copy_choices(pipeline, configured)
    return configured


def _apply(profile: Profile, step: str, task: dsl.PipelineTask) -> None:
    settings = profile.step_settings(step)
    is_data = container_images.variant(task.container_spec.image) == "data"
    if image := profile.images.data if is_data else profile.images.trainer:
        task.set_container_image(image)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    if profile.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.images.pull_secrets))
    kubernetes.set_security_context(task, profile.identity.user, profile.identity.group, run_as_non_root=True)
    _add_labels(profile, step, task)
    _set_limits(profile, settings, task)
    _select_nodes(settings, task)
    _mount_volumes(profile, settings, task)
    _set_environment(profile, task)
    if step == "notify" and (ui_address := profile.kubeflow_pipelines.ui_address()):
        task.set_env_variable(environment.KFP_UI_ENDPOINT.name, ui_address)
    if step == "train" and profile.runtime:
        task.set_env_variable(environment.TRAINING_RUNTIME.name, profile.runtime)
        if profile.train_on_nodes:
            task.set_env_variable(environment.TRAIN_ON_NODES.name, "true")


def _add_labels(profile: Profile, step: str, task: dsl.PipelineTask) -> None:
    labels = {
        "app.kubernetes.io/name": "minicpmv-finetune",
        "app.kubernetes.io/component": step,
        "app.kubernetes.io/managed-by": "kubeflow-pipelines",
        **profile.labels,
    }
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)


def _set_limits(profile: Profile, settings: StepSettings, task: dsl.PipelineTask) -> None:
    task.set_cpu_request(settings.cpu[0]).set_cpu_limit(settings.cpu[1])
    task.set_memory_request(settings.memory[0]).set_memory_limit(settings.memory[1])
    kubernetes.set_timeout(task, settings.timeout_seconds)
    longest = profile.retry.longest_duration(settings.timeout_seconds)
    task.set_retry(profile.retry.attempts, f"{_LOST_POD_BACKOFF}s", _LOST_POD_FACTOR, f"{longest}s")
    waits = " ".join(f"{seconds:g}" for seconds in profile.retry.waits())
    task.set_env_variable(environment.RETRY_WAITS.name, waits or NO_RETRY)


def _select_nodes(settings: StepSettings, task: dsl.PipelineTask) -> None:
    if settings.accelerator:
        task.set_accelerator_type(settings.accelerator.resource).set_accelerator_limit(settings.accelerator.count)
    for toleration in settings.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for key, value in settings.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    if settings.queue:
        kubernetes.add_pod_label(task, QUEUE_LABEL, settings.queue)


def _mount_volumes(profile: Profile, settings: StepSettings, task: dsl.PipelineTask) -> None:
    scratch = settings.scratch
    if scratch.storage_class is None:
        kubernetes.empty_dir_mount(task, "scratch", "/scratch", size_limit=scratch.size)
        task.set_env_variable(environment.SCRATCH_LIMIT.name, scratch.size)
    else:
        kubernetes.add_ephemeral_volume(
            task, "scratch", "/scratch", ["ReadWriteOnce"], scratch.size, scratch.storage_class
        )
    # For downloads and the caches of libraries; a user without a home directory has no other writable folder.
    for name, folder in {"TMPDIR": "/scratch", "HOME": "/scratch", "HF_HOME": "/scratch/huggingface"}.items():
        task.set_env_variable(name, folder)
    if settings.shared_memory:
        # Data loader processes pass tensors through it; with the default of 64 MB they end with a bus error.
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", settings.shared_memory)  # noqa: S108
    if profile.base_models:
        kubernetes.mount_pvc(task, profile.base_models.claim, profile.base_models.mount)
    for volume in profile.volumes:
        kubernetes.mount_pvc(task, volume.claim, volume.mount)
    if profile.ca_bundle:
        kubernetes.use_config_map_as_volume(task, profile.ca_bundle.config_map, CA_FOLDER)


def _set_environment(profile: Profile, task: dsl.PipelineTask) -> None:
    variables = {
        "AWS_ENDPOINT_URL": profile.s3.endpoint,
        "AWS_DEFAULT_REGION": profile.s3.region,
        environment.TRACKING_URI.name: profile.mlflow.tracking_uri if profile.mlflow else "",
        environment.EXPERIMENT.name: profile.mlflow.experiment if profile.mlflow else "",
        environment.MLFLOW_UI.name: _mlflow_ui(profile),
        environment.ALLOWED_URIS.name: " ".join(profile.allowed_uris),
        "HF_ENDPOINT": profile.hub.endpoint,
        **_network_variables(profile),
    }
    for name, value in variables.items():
        if value:
            task.set_env_variable(name, value)
    kubernetes.use_secret_as_env(task, profile.s3.secret, profile.s3.variables)
    if profile.mlflow and (credentials := profile.mlflow.credentials):
        kubernetes.use_secret_as_env(task, credentials.secret, credentials.variables)
    if profile.hub.secret:
        kubernetes.use_secret_as_env(task, profile.hub.secret, profile.hub.variables)


def _mlflow_ui(profile: Profile) -> str:
    return without_password(environment.MLFLOW_UI.read() or profile.mlflow.ui_endpoint) if profile.mlflow else ""


def _network_variables(profile: Profile) -> dict[str, str]:
    """The variables by which libraries, and Kubeflow's launcher in the same container, find proxy and certificates."""
    variables: dict[str, str] = {}
    if profile.proxy.http or profile.proxy.https:
        # Kubernetes puts in the address of its API, which the launcher calls by number.
        inside = ("localhost", "127.0.0.1", "$(KUBERNETES_SERVICE_HOST)", ".svc", ".svc.cluster.local")
        bypass = ",".join((*inside, ".kubeflow", f".{profile.namespace}", *profile.proxy.bypass))
        for name, value in {"http": profile.proxy.http, "https": profile.proxy.https, "no": bypass}.items():
            # Some libraries read only the one spelling, some only the other.
            variables |= {f"{name.upper()}_PROXY": value, f"{name}_proxy": value}
    if profile.ca_bundle:
        file = f"{CA_FOLDER}/{profile.ca_bundle.key}"
        variables |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"), file)
    return variables
