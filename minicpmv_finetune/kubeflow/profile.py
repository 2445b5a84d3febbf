"""What differs between clusters, in one file: `k8s/profiles/NAME.yaml`.

The pipeline itself says nothing of nodes, secrets or limits. A profile does, and `with_profile` gives its settings to
every task: who it runs as, what it may use, how long it may take, where its credentials come from. What is compiled is
an ordinary pipeline, so the Kubeflow UI, the SDK and schedules need to know nothing of profiles.

Secrets are named here, never held: their keys become environment variables of the containers.
"""

import difflib
import os
import re
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from kfp import dsl, kubernetes
from kfp.dsl import pipeline_context
from kfp.dsl.graph_component import GraphComponent
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from minicpmv_finetune import container_images, environment
from minicpmv_finetune.errors import UserError, describe_validation_error
from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.retraining import RETRAIN

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def _pinned(image: str) -> str:
    if not re.search(r"(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})$", image) or image.endswith(":latest"):
        raise ValueError("an image needs a digest (…@sha256:…) or a tag other than latest")
    return image


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGTPE]i?)?$")]
Image = Annotated[str, AfterValidator(_pinned)]
Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Section):
    """The two images, by digest or an explicit tag; `latest` is refused."""

    data: Image
    trainer: Image
    pull_secrets: tuple[Name, ...] = ()


class Identity(_Section):
    """Whom containers run as: the user the images are built for, never root."""

    user: int = Field(default=1000, ge=1)
    group: int = Field(default=1000, ge=1)


class Retry(_Section):
    """How often a failed task is tried again; the wait grows from backoff by factor up to longest_backoff."""

    attempts: int = Field(default=3, ge=0, le=10)
    backoff: str = Field(default="60s", pattern=r"^\d+s$")
    factor: float = Field(default=2.0, ge=1)
    longest_backoff: str = Field(default="1800s", pattern=r"^\d+s$")


class SecretEnvironment(_Section):
    """A Secret of the run's namespace, and which of its keys become which environment variables."""

    secret: Name
    variables: dict[str, str] = Field(min_length=1)


class S3(SecretEnvironment):
    """Object storage: its address, and the Secret with its credentials."""

    endpoint: str = Field(default="", description="empty means the provider's own")
    region: str = "us-east-1"
    variables: dict[str, str] = {
        "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    }


class MLflow(_Section):
    """The tracking server, and the Secret with its credentials if it asks for any."""

    tracking_uri: str
    experiment: str = "minicpmv-finetune"
    credentials: SecretEnvironment | None = None


class KubeflowPipelines(_Section):
    """Where the API server is; `KF_PIPELINES_ENDPOINT` and `KF_PIPELINES_UI_ENDPOINT` in the environment win."""

    endpoint: str = ""
    ui_endpoint: str = ""
    time_zone: str = Field(default="UTC", description="in which the server reads schedules (CRON_SCHEDULE_TIMEZONE)")


class Accelerator(_Section):
    """Devices of a task, by the name under which the cluster offers them."""

    resource: str = "nvidia.com/gpu"
    count: int = Field(default=1, ge=1)


class Toleration(_Section):
    """A taint that a task's pod accepts."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] = "NoSchedule"


class Scratch(_Section):
    """Disk for downloads and temporary files: of the node, or of a storage class for as long as the task runs.

    Kubeflow cannot set a pod's `fsGroup`, so a storage class must hand out volumes that any user may write.
    """

    size: Quantity
    storage_class: str | None = Field(default=None, description="none takes the node's own disk")


class Task(_Section):
    """What one step may use."""

    cpu: tuple[Quantity, Quantity] = Field(description="requested and at most")
    memory: tuple[Quantity, Quantity] = Field(description="requested and at most; shared memory counts as memory")
    timeout_seconds: int = Field(ge=60)
    scratch: Scratch
    shared_memory: Quantity | None = Field(default=None, description="size of /dev/shm; the runtime's 64 MB if none")
    accelerator: Accelerator | None = None
    tolerations: tuple[Toleration, ...] = ()
    node_selector: dict[str, str] = {}
    queue: Name | None = Field(default=None, description="Kueue LocalQueue that admits the task")


class ModelVolume(_Section):
    """A claim with base models; `base_model_uri: /models/NAME` then reads from it."""

    claim: Name
    mount: str = Field(default="/models", pattern=r"^/")


class Profile(_Section):
    """One cluster's settings."""

    schema_version: Literal[1] = Field(default=1, description="a newer one needs a newer program")
    name: str = ""
    namespace: Name
    service_account: Name
    kubeflow_pipelines: KubeflowPipelines = KubeflowPipelines()
    pipeline_root: str = Field(default="", description="empty leaves it to the namespace's kfp-launcher")
    images: Images
    identity: Identity = Identity()
    labels: dict[str, Label] = {}
    retry: Retry = Retry()
    s3: S3
    mlflow: MLflow
    base_models: ModelVolume | None = None
    allowed_uris: tuple[str, ...] = Field(
        default=(), description="folders that data, and the images it names, may lie in; none allows every place"
    )
    runtime: Name | None = Field(default=None, description="TrainingRuntime for training on several nodes")
    preprocess_partitions: int = Field(default=1, ge=1, description="pods that share the work of preprocess")
    default: Task = Field(description="what a step without an entry of its own under `steps` may use")
    steps: dict[str, Task] = {}

    @field_validator("steps")
    @classmethod
    def _known_steps(cls, steps: dict[str, Task]) -> dict[str, Task]:
        # Where several pods share preprocess, each part is a task of its own.
        known = {*FINETUNE.steps, *RETRAIN.steps, "preprocess-part"}
        for name in steps:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"no pipeline has a step {name!r}; {meant}the steps are {', '.join(sorted(known))}")
        return steps

    def task(self, step: str) -> Task:
        """The settings of a step."""
        return self.steps.get(step, self.default)

    def secrets(self) -> dict[str, set[str]]:
        """Every Secret that a run needs in its namespace, with the keys it must hold."""
        needed = {self.s3.secret: set(self.s3.variables)}
        if credentials := self.mlflow.credentials:
            needed.setdefault(credentials.secret, set()).update(credentials.variables)
        return needed


def use_storage(profile: Profile) -> None:
    """Let this process reach the storage that the profile names, unless the environment names another."""
    if profile.s3.endpoint:
        os.environ.setdefault("AWS_ENDPOINT_URL", profile.s3.endpoint)
    os.environ.setdefault("AWS_DEFAULT_REGION", profile.s3.region)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        UserError: there is no such file, or it says something a profile cannot say.
    """
    try:
        said = yaml.safe_load(path.read_text())
        return Profile.model_validate({"name": path.stem, **said})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give one of k8s/profiles.") from error
    except (yaml.YAMLError, TypeError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{path}: not a YAML mapping ({reason:.200}); see k8s/README.md.") from error
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation_error(error, 'profile')}; see k8s/README.md.") from error


def with_profile(pipeline: GraphComponent, profile: Profile) -> GraphComponent:
    """The same pipeline with a cluster's settings on each of its tasks."""

    @wraps(pipeline.pipeline_func)
    def build(*inputs: Any) -> Any:
        outputs = pipeline.pipeline_func(*inputs)
        for name, task in pipeline_context.Pipeline.get_default_pipeline().tasks.items():
            # A pipeline used as a task has no container of its own.
            if task.container_spec is not None:
                _apply(profile, name, task)
        return outputs

    about = pipeline.pipeline_spec.pipeline_info
    return dsl.pipeline(name=about.name, display_name=about.display_name, description=about.description)(build)


def _apply(profile: Profile, step: str, task: dsl.PipelineTask) -> None:
    settings = profile.task(step)
    variant = container_images.variant(task.container_spec.image)
    task.set_container_image(profile.images.data if variant == "data" else profile.images.trainer)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    if profile.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.images.pull_secrets))
    kubernetes.set_security_context(task, profile.identity.user, profile.identity.group, run_as_non_root=True)
    _label(profile, step, task)
    _limit(profile, settings, task)
    _place(settings, task)
    _mount(profile, settings, task)
    _connect(profile, task)
    if step == "train" and profile.runtime:
        task.set_env_variable(environment.TRAINING_RUNTIME.name, profile.runtime)


def _label(profile: Profile, step: str, task: dsl.PipelineTask) -> None:
    labels = {
        "app.kubernetes.io/name": "minicpmv-finetune",
        "app.kubernetes.io/component": step,
        "app.kubernetes.io/managed-by": "kubeflow-pipelines",
        **profile.labels,
    }
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)


def _limit(profile: Profile, settings: Task, task: dsl.PipelineTask) -> None:
    task.set_cpu_request(settings.cpu[0]).set_cpu_limit(settings.cpu[1])
    task.set_memory_request(settings.memory[0]).set_memory_limit(settings.memory[1])
    kubernetes.set_timeout(task, settings.timeout_seconds)
    retry = profile.retry
    task.set_retry(retry.attempts, retry.backoff, retry.factor, retry.longest_backoff)


def _place(settings: Task, task: dsl.PipelineTask) -> None:
    if settings.accelerator:
        task.set_accelerator_type(settings.accelerator.resource).set_accelerator_limit(settings.accelerator.count)
    for toleration in settings.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for key, value in settings.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    if settings.queue:
        kubernetes.add_pod_label(task, QUEUE_LABEL, settings.queue)


def _mount(profile: Profile, settings: Task, task: dsl.PipelineTask) -> None:
    scratch = settings.scratch
    if scratch.storage_class is None:
        kubernetes.empty_dir_mount(task, "scratch", "/scratch", size_limit=scratch.size)
    else:
        kubernetes.add_ephemeral_volume(
            task, "scratch", "/scratch", ["ReadWriteOnce"], scratch.size, scratch.storage_class
        )
    # Downloads, and what libraries cache; a user without a home directory has no other place.
    for name, folder in {"TMPDIR": "/scratch", "HOME": "/scratch", "HF_HOME": "/scratch/huggingface"}.items():
        task.set_env_variable(name, folder)
    if settings.shared_memory:
        # Processes that load data hand tensors over through it; 64 MB end in a bus error.
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", settings.shared_memory)  # noqa: S108
    if profile.base_models:
        kubernetes.mount_pvc(task, profile.base_models.claim, profile.base_models.mount)


def _connect(profile: Profile, task: dsl.PipelineTask) -> None:
    variables = {
        "AWS_ENDPOINT_URL": profile.s3.endpoint,
        "AWS_DEFAULT_REGION": profile.s3.region,
        environment.TRACKING_URI.name: profile.mlflow.tracking_uri,
        environment.EXPERIMENT.name: profile.mlflow.experiment,
        environment.ALLOWED_URIS.name: " ".join(profile.allowed_uris),
    }
    for name, value in variables.items():
        if value:
            task.set_env_variable(name, value)
    kubernetes.use_secret_as_env(task, profile.s3.secret, profile.s3.variables)
    if credentials := profile.mlflow.credentials:
        kubernetes.use_secret_as_env(task, credentials.secret, credentials.variables)
