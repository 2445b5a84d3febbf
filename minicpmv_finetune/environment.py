"""Every environment variable that this project reads, in one table.

Our own begin with `MINICPMV_FINETUNE_`; the others belong to MLflow, Kubeflow, Kubernetes and torchrun, and keep their
names. A variable is read when its value is needed, never while a module is imported, and a blank one counts as unset.
`AWS_*` and `HF_*` are not here: boto3 and huggingface_hub read them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "MINICPMV_FINETUNE_"


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: of the variable.
        help: what it decides.
        default: value where it is unset or blank.
        former: its name in 0.1.0, which is still read: pipelines that were compiled then set it.
    """

    name: str
    help: str
    default: str = ""
    former: str = ""

    def read(self, environment: Mapping[str, str] | None = None) -> str:
        """The value now, in this process's environment or another."""
        values = os.environ if environment is None else environment
        found = (values.get(name, "") for name in (self.name, self.former))
        return next((value for value in found if value.strip()), self.default)

    def __str__(self) -> str:
        return self.name


# Ours.
REGISTRY = Variable(f"{PREFIX}REGISTRY", "registry of the container images of a compiled pipeline", "minicpmv-finetune")
TAG = Variable(f"{PREFIX}TAG", "tag of these container images; this version's number without it")
PROFILE = Variable(
    f"{PREFIX}PROFILE", "profile of the commands that talk to a cluster, where --profile is not given: a name or a path"
)
NAMESPACE = Variable(
    f"{PREFIX}NAMESPACE", "namespace of the runs, where --namespace is not given; the profile's without it"
)
MLFLOW = Variable(f"{PREFIX}MLFLOW", "address of MLflow as the pods of a run reach it, for a profile that names none")
ALLOWED_URIS = Variable(
    f"{PREFIX}ALLOWED_URIS",
    "folders that data and its images may be read from, separated by spaces; without it every place may be",
    former="MINICPMV_ALLOWED_URIS",
)
RETRY_WAITS = Variable(
    f"{PREFIX}RETRY_WAITS",
    "seconds that a step of a pipeline waits after each fault before it tries again, separated by spaces, or none; "
    "after the last attempt it ends with 75",
    "30 60 120",
)
PROGRESS_SECONDS = Variable(
    f"{PREFIX}PROGRESS_SECONDS", "seconds between two lines of progress in a log", "10", "MINICPMV_PROGRESS_SECONDS"
)
QUIET = Variable(f"{PREFIX}QUIET", "set by --quiet: a step shows neither its progress nor its outcome")
WEBHOOK_URL = Variable(
    f"{PREFIX}WEBHOOK_URL", "address that notify posts to; from a Secret on a cluster", former="MINICPMV_WEBHOOK_URL"
)
TRAINING_RUNTIME = Variable(
    f"{PREFIX}TRAINING_RUNTIME",
    "Kubeflow Trainer's TrainingRuntime for training on several nodes",
    "minicpmv-finetune",
    "MINICPMV_TRAINING_RUNTIME",
)
TRAIN_ON_NODES = Variable(
    f"{PREFIX}TRAIN_ON_NODES", "set by a profile whose train pod has no GPU: one node trains on that runtime too"
)
SCRATCH_LIMIT = Variable(
    f"{PREFIX}SCRATCH_LIMIT",
    "limit of the volume for temporary files (TMPDIR), such as 500Gi, where its free space does not show it; profiles "
    "set it for a volume on the node's disk",
)
GIT_COMMIT = Variable(f"{PREFIX}GIT_COMMIT", "commit that the code was built from; container images set it", "unknown")
WORKER_EXIT_FOLDER = Variable(
    f"{PREFIX}WORKER_EXIT_FOLDER", "set by the launcher: folder into which its training processes write why they ended"
)

MLFLOW_UI = Variable(
    f"{PREFIX}MLFLOW_UI",
    "address at which people open MLflow, for links on the pages of a run; the profile's without it",
)

# MLflow's.
TRACKING_URI = Variable("MLFLOW_TRACKING_URI", "address of MLflow; without it nothing is tracked")
EXPERIMENT = Variable("MLFLOW_EXPERIMENT_NAME", "experiment of the runs", "minicpmv-finetune")
PLUGIN_RUN_ID = Variable("MLFLOW_RUN_ID", "run that Kubeflow's MLflow plugin has opened; steps nest below it")

# Kubeflow's and Kubernetes'.
PIPELINE_RUN_ID = Variable("KFP_RUN_ID", "id of the pipeline run; the pipeline sets it from a label of the pod")
RETRY_INDEX = Variable(
    "KFP_RETRY_INDEX", "how often Argo has started this pod again; 0 also where a person started the step again", "0"
)
POD_NAME = Variable("KFP_POD_NAME", "name of this pod; its host name without it")
KFP_ENDPOINT = Variable("KF_PIPELINES_ENDPOINT", "address of the Kubeflow Pipelines API; the profile's without it")
KFP_UI_ENDPOINT = Variable("KF_PIPELINES_UI_ENDPOINT", "address that links begin with; the profile's without it")
KFP_TOKEN = Variable("KF_PIPELINES_TOKEN", "token for the Kubeflow Pipelines API")
KFP_TOKEN_FILE = Variable(
    "KF_PIPELINES_SA_TOKEN_PATH",
    "file with a service account's token for it",
    "/var/run/secrets/kubeflow/pipelines/token",
)
KUBECONFIG = Variable("KUBECONFIG", "how to reach Kubernetes from outside a cluster")
TRAINER_SERVER = Variable(
    "KUBEFLOW_TRAINER_SERVER_URL", "set by Kubeflow Trainer where it collects progress: its controller's address"
)
KUBERNETES_HOST = Variable("KUBERNETES_SERVICE_HOST", "set by Kubernetes in every pod")

# torchrun's and Kubeflow Trainer's.
RANK = Variable("RANK", "number of this training process among all", "0")
LOCAL_RANK = Variable("LOCAL_RANK", "number of this training process on its machine", "0")
WORLD_SIZE = Variable("WORLD_SIZE", "number of training processes", "1")
LOCAL_WORLD_SIZE = Variable("LOCAL_WORLD_SIZE", "number of training processes on this machine")
GROUP_RANK = Variable("GROUP_RANK", "number of this machine among all", "0")
TORCHELASTIC_RUN_ID = Variable("TORCHELASTIC_RUN_ID", "id that torchrun gives a launch")
NODES = Variable("PET_NNODES", "number of nodes, set by Kubeflow Trainer")
NODE_RANK = Variable("PET_NODE_RANK", "number of this node, set by Kubeflow Trainer", "0")
PROCESSES_A_NODE = Variable("PET_NPROC_PER_NODE", "training processes a node; a number, or cpu, gpu or auto")
MAX_RESTARTS = Variable("PET_MAX_RESTARTS", "how often torchrun starts its processes again")
THREADS = Variable("OMP_NUM_THREADS", "threads of a process; by default its share of the cores that it may use")
SPIN_TURNS = Variable(
    "GOMP_SPINCOUNT",
    "turns that waiting threads spin before they sleep; by default 10000 on free cores, otherwise 1000",
)
ACCELERATE_USE_DEEPSPEED = Variable("ACCELERATE_USE_DEEPSPEED", "Accelerate's own; `true` asks for DeepSpeed")
ALLOCATOR = Variable(
    "PYTORCH_ALLOC_CONF",
    "settings of torch's allocator of GPU memory; batches of different sizes leave gaps without this default",
    "expandable_segments:True",
    "PYTORCH_CUDA_ALLOC_CONF",
)

# vLLM's.
VLLM_KEY = Variable("VLLM_API_KEY", "key that clients must send, where `serve` starts vLLM; vLLM reads it too")

# The machine's.
C_COMPILER = Variable("CC", "C compiler that Triton and DeepSpeed use", "cc")

VARIABLES = tuple(value for value in list(globals().values()) if isinstance(value, Variable))
