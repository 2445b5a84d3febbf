"""The flags of the published finetune.py, with their defaults, and every flag of transformers.TrainingArguments.

Flags that transformers 5 removed are mapped to their successors, or refused with one sentence. So a launch script that
was written for the published Python file keeps working.

Each flag of ours states in its metadata (`IN_DIGEST`) whether it takes part in the digest by which an interrupted
training finds its checkpoints: always, never, or `UNLESS_DEFAULT`; `training_identity` has the same for the flags of
transformers.
"""

import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType

from minicpmv_finetune import environment
from minicpmv_finetune.cores import cores
from minicpmv_finetune.errors import UserError, first_line
from minicpmv_finetune.minicpmv.generations import PUBLISHED_LORA_TARGETS
from minicpmv_finetune.workers import SHARED_MEMORY

from .flags import (
    ATTENTIONS,
    FLASH_WITHOUT_GPU,
    FP16_WITHOUT_GPU,
    FSDP_WITHOUT_GPU,
    PARTITIONED_4_BIT,
    PARTITIONED_WEIGHTS,
    check_flags,
)
from .flags import as_flags as as_flags  # pipelines that 0.1.0 compiled import it from here
from .flags import pop_num_nodes as pop_num_nodes
from .intervals import choose_intervals

IN_DIGEST = "in_digest"
UNLESS_DEFAULT = "unless default"
"""Of a flag that came after 0.1.0: it takes part only with another value than its default."""
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
_CONTROLLER_SECONDS = 3  # in which Kubeflow Trainer's controller must accept a connection
_LOADER_MEMORY = 2**30  # bytes of shared memory; the prefetched batches of four workers are some hundred megabytes
# What transformers and torch raise for a value that they cannot use.
_ERRORS_OF_VALUES = (ValueError, ImportError, OSError, TypeError, KeyError, AttributeError, RuntimeError)
_STRATEGY_FOLDER = Path(__file__).parent / "strategies"


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = field(
        default="openbmb/MiniCPM-V-4.6",
        metadata={"help": "Base checkpoint: a folder, an s3:// URI or a hub id.", IN_DIGEST: True},
    )


@dataclass
class DataArguments:
    """Which data it is trained on."""

    data_path: str = field(
        default="",
        metadata={"help": "Training data: a shards folder, or raw JSON, which is prepared first.", IN_DIGEST: True},
    )
    eval_data_path: str = field(
        default="",
        metadata={
            "help": "Evaluation data as raw JSON; with a shards folder its own eval split is used.",
            IN_DIGEST: True,
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; every flag of transformers.TrainingArguments is accepted too."""

    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloads and stored vision features.", IN_DIGEST: False}
    )
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer.", IN_DIGEST: True})
    model_max_length: int = field(
        default=2048,
        metadata={
            "help": "Longest sample in tokens; longer ones are rejected in preprocessing, never cut.",
            IN_DIGEST: True,
        },
    )
    tune_vision: bool = field(default=True, metadata={"help": "Train the vision tower.", IN_DIGEST: True})
    tune_llm: bool = field(default=True, metadata={"help": "Train the language model's own weights.", IN_DIGEST: True})
    llm_type: str | None = field(
        default=None,
        metadata={
            "help": "Published name of the chat format (minicpm, llama3, qwen); by default derived from the "
            "checkpoint, otherwise compared with it.",
            IN_DIGEST: True,
        },
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Train LoRA adapters on the language model.", IN_DIGEST: True}
    )
    max_slice_nums: int = field(default=9, metadata={"help": "Maximum number of slices of an image.", IN_DIGEST: True})
    # The collator needs every column.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Accepted for compatibility; always false.", IN_DIGEST: True}
    )

    strategy: str = field(
        default="ddp",
        metadata={
            "choices": list(STRATEGIES),
            "help": "How several processes share the work: each has a copy of the model (ddp; also for one process), "
            "or DeepSpeed's zero2 or zero3, or fsdp2. Your own --deepspeed or --fsdp configuration takes precedence.",
            IN_DIGEST: True,
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Compute in bfloat16; by default if the GPU supports it and fp16 is off.", IN_DIGEST: True},
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Number of processes that prepare batches; by default up to 4 for each GPU if /dev/shm has a "
            "gigabyte for them, otherwise 0.",
            IN_DIGEST: False,
        },
    )
    dataloader_persistent_workers: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Keep the data loader's workers from one epoch to the next; by default if there are any.",
            IN_DIGEST: False,
        },
    )
    checkpoint_uri: str = field(
        default="",
        metadata={
            "help": "Folder or s3:// URI of checkpoints, from which an interrupted training continues; {digest} in it "
            "stands for this training's digest. By default beside output_dir until the training has finished.",
            IN_DIGEST: False,
        },
    )
    supervised_logits_only: bool = field(
        default=True,
        metadata={
            "help": "Compute logits only for supervised tokens; loss and gradients are the same.",
            IN_DIGEST: True,
        },
    )
    fused_lora: bool = field(
        default=True,
        metadata={
            "help": "Compute a layer and its adapter in one operation; loss and gradients are the same.",
            IN_DIGEST: True,
        },
    )
    reuse_vision_features: bool = field(
        default=True,
        metadata={
            "help": "Compute the outputs of a frozen vision tower once and store them in --cache_dir, if the training "
            "uses the data more than once; needs --tune_vision false.",
            IN_DIGEST: True,
        },
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "choices": list(ATTENTIONS),
            "help": "Attention: torch's own (sdpa), which chooses among its kernels and on a GPU takes packed rows as "
            "they are; flash_attention_2 or _3 with its package; or the slow reference (eager).",
            # Another card may need another one at a retry; results differ by rounding alone.
            IN_DIGEST: False,
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put several samples into one row of at most model_max_length tokens, without padding; no sample "
            "attends to another. The batch size then counts such rows.",
            IN_DIGEST: True,
        },
    )
    share_images: bool = field(
        default=False,
        metadata={
            "help": "Put samples that begin with the same image into one row of at most model_max_length tokens, which "
            "has the image once; each conversation sees the image and itself only. The batch size then counts rows.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    tokens_per_batch: int = field(
        default=0,
        metadata={
            "help": "Fill each batch of a device with samples of similar lengths up to this number of tokens, in one "
            "row without padding as with --packing; replaces per_device_train_batch_size. 0 counts samples.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Stop after this number of evaluations without a better loss; 0 never stops early.",
            IN_DIGEST: True,
        },
    )
    vision_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the vision tower, whole or with adapters; by default --learning_rate.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    resampler_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the resampler or merger; by default --learning_rate.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    embedding_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of embeddings and head; by default --learning_rate.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )

    def __post_init__(self) -> None:
        """Complete the arguments as transformers does."""
        # Set explicitly, because without a GPU transformers treats a DeepSpeed run as a single process.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.ddp_find_unused_parameters is None:
            # Every parameter takes part in every step: if a batch has no image, the models process a blank one.
            self.ddp_find_unused_parameters = False
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else _default_workers()
        # Starting the workers again in each epoch took a fifth of the training time of a small model with stored
        # features.
        self.dataloader_persistent_workers = (
            self.dataloader_num_workers > 0 and self.dataloader_persistent_workers is not False
        )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_bf16_supported()
        if str(self.fsdp).lower() in ("true", "false"):
            # As a flag's value transformers knows only the names of strategies, which it has deprecated.
            self.fsdp = str(self.fsdp).lower() == "true" or None  # type: ignore[assignment]
        if not self.deepspeed and not self.fsdp:
            if self.strategy in ("zero2", "zero3"):
                self.deepspeed = str(_STRATEGY_FOLDER / f"{self.strategy}.json")
            elif self.strategy == "fsdp2":
                self.fsdp = True  # type: ignore[assignment]
                self.fsdp_config = str(_STRATEGY_FOLDER / "fsdp2.json")
        if self.tokens_per_batch:
            self.per_device_train_batch_size = 1  # an item of the data is a whole batch
        if self.early_stopping_patience:
            self.load_best_model_at_end = True
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"
        super().__post_init__()

    @property
    def has_packed_rows(self) -> bool:
        """Whether an item of the training data is a row of several samples."""
        return self.packing or self.share_images or bool(self.tokens_per_batch)


def _default_workers() -> int:
    """Number of data loading workers for each GPU, so that it does not wait while images are decoded and placed."""
    try:
        shared_memory = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0
    processes = int(environment.LOCAL_WORLD_SIZE.read() or 1)
    return min(4, cores() // processes) if shared_memory >= _LOADER_MEMORY else 0


@dataclass
class LoraArguments:
    """Which adapters are trained."""

    lora_r: int = field(default=64, metadata={"help": "Rank.", IN_DIGEST: True})
    lora_alpha: int = field(
        default=64, metadata={"help": "Scale; the update is multiplied by alpha / r.", IN_DIGEST: True}
    )
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout rate of the adapters' inputs.", IN_DIGEST: True}
    )
    lora_target_modules: str = field(
        default=PUBLISHED_LORA_TARGETS,
        metadata={
            "help": "Regular expression of module names; `llm.` means the language model in every generation.",
            IN_DIGEST: True,
        },
    )
    lora_targets: str = field(
        default="",
        metadata={
            "help": "Parts that get adapters instead of being trained whole, separated by commas: llm (the layers of "
            "--lora_target_modules), resampler (or merger) and vision (all their linear layers).",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    lora_weight_path: str = field(default="", metadata={"help": "Continue from this adapter.", IN_DIGEST: True})
    lora_bias: str = field(
        default="none", metadata={"help": "Biases that are trained: none, all or lora_only.", IN_DIGEST: True}
    )
    q_lora: bool = field(
        default=False,
        metadata={
            "help": "Load the language model in 4 bits; its embeddings are then trained whole only where "
            "lora_modules_to_save names embed_tokens.",
            IN_DIGEST: True,
        },
    )
    lora_modules_to_save: str = field(
        default="",
        metadata={
            "help": "Modules that are trained and saved whole, besides embeddings and merger, separated by commas; "
            "`none` leaves those two frozen.",
            IN_DIGEST: True,
        },
    )
    lora_layer_replication: str | None = field(
        default=None,
        metadata={"help": "Stack the language model's layers from ranges, such as 0:4,2:6.", IN_DIGEST: True},
    )
    lora_layers_to_transform: str | None = field(
        default=None,
        metadata={"help": "Put adapters only on these layers of the language model, such as 0,1,5.", IN_DIGEST: True},
    )
    lora_layers_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Name of the list of layers that the numbers of lora_layers_to_transform refer to.",
            IN_DIGEST: True,
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "DoRA: train the length of each row of a weight apart from its direction.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={
            "help": "rsLoRA: multiply the update by alpha / sqrt(r) instead of alpha / r.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How adapters begin: at zero (true); with the weights' largest singular values (pissa, or the much "
            "faster pissa_niter_16 with that many iterations); with the gradient's on 64 samples (lora_ga).",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+: how many times the learning rate of B is that of A; the paper advises 16.",
            IN_DIGEST: UNLESS_DEFAULT,
        },
    )

    def __post_init__(self) -> None:
        """Write names in one way: a YAML file's `true` arrives as True, and an empty value means the default."""
        self.init_lora_weights = self.init_lora_weights.lower() or "true"


@dataclass(frozen=True)
class Arguments:
    """All groups of flags, parsed and checked.

    Attributes:
        model: Which model is trained.
        data: Which data it is trained on.
        training: How it is trained.
        lora: Which adapters are trained.
        given: Names of the flags that the user gave; the others have their defaults.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments
    given: frozenset[str] = frozenset()


def input_places(arguments: Arguments) -> dict[str, str]:
    """The paths and URIs that a training reads, by the names of their flags."""
    training = arguments.training
    resumed = str(training.resume_from_checkpoint or "")
    return {
        "--model_name_or_path": arguments.model.model_name_or_path,
        "--data_path": arguments.data.data_path,
        "--eval_data_path": arguments.data.eval_data_path or "",
        "--lora_weight_path": arguments.lora.lora_weight_path or "",
        "--resume_from_checkpoint": "" if resumed.lower() in ("true", "false") else resumed,
    }


class _Parser(HfArgumentParser):
    """Reads flags into the groups; hides our own metadata from argparse."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add a flag."""
        options.pop(IN_DIGEST, None)
        return super().add_argument(*names, **options)


def parser() -> HfArgumentParser:
    """Create the parser of all groups; its help lists every flag."""
    return _Parser(
        (ModelArguments, DataArguments, TrainingArguments, LoraArguments),  # type: ignore[arg-type]
        prog="minicpmv-finetune train",
        allow_abbrev=False,
    )


def parse(argv: Sequence[str], announce: Callable[[str], None] = print) -> Arguments:
    """Parse flags, such as those of a published launch script.

    Args:
        argv: Flags without the program's name; a YAML file of flags may come first.
        announce: Receives a sentence for each flag that no longer has an effect.

    Raises:
        UserError: A flag or value is unknown, or flags contradict each other.
    """
    flags = check_flags(argv, announce)
    instance = parser()
    instance.error = _fail  # type: ignore[method-assign, assignment]
    try:
        model, data, training, lora = instance.parse_args_into_dataclasses(args=flags)
    except _ERRORS_OF_VALUES as error:
        if "process group" in str(error):
            # What transformers leaves behind where torch was built without a backend.
            raise UserError("--ddp_backend: torch has no such backend on this machine; leave the flag out.") from error
        raise UserError(f"Training arguments: {first_line(error)}") from error
    given = frozenset(flag[2:].partition("=")[0] for flag in flags if flag.startswith("--"))
    if training.tokens_per_batch and "per_device_train_batch_size" in given:
        announce("--per_device_train_batch_size has no effect: --tokens_per_batch says how large a batch is.")
    if training.tokens_per_batch and training.packing:
        announce("--packing has no effect: --tokens_per_batch packs each batch into one row.")
    arguments = Arguments(model, data, training, lora, given)
    _check(arguments)
    _check_optimizer(training, _given_rates(arguments))
    training.report_to = _without_silent_controller(_installed_integrations(training.report_to, announce), announce)
    choose_intervals(arguments.training, given)
    return arguments


def _check(arguments: Arguments) -> None:
    """Check what depends on this machine's devices or on DeepSpeed's configuration."""
    training = arguments.training
    if training.fsdp and training.use_cpu:
        # accelerate would train plain DDP without a warning.
        raise UserError(FSDP_WITHOUT_GPU)
    if training.fp16 and training.use_cpu:
        raise UserError(FP16_WITHOUT_GPU)
    if training.attn_implementation.startswith("flash"):
        if training.use_cpu:
            raise UserError(FLASH_WITHOUT_GPU)
        if not training.bf16 and not training.fp16:
            raise UserError(
                f"--attn_implementation {training.attn_implementation}: computes in half precision alone; give "
                "--bf16 true, or leave the flag out."
            )
    if training.dataloader_multiprocessing_context and not training.dataloader_num_workers:
        raise UserError("--dataloader_multiprocessing_context: there are no workers; give --dataloader_num_workers.")
    if arguments.lora.q_lora and (training.fsdp or _shards_parameters(training)):
        raise UserError(PARTITIONED_4_BIT)
    if arguments.lora.init_lora_weights != "true" and (training.fsdp or _shards_parameters(training)):
        raise UserError(f"--init_lora_weights {arguments.lora.init_lora_weights}: {PARTITIONED_WEIGHTS}.")
    config = getattr(training, "hf_deepspeed_config", None)
    given = _given_rates(arguments)
    if given and config is not None and config.get_value("optimizer"):
        raise UserError(
            f"{given[0]}: DeepSpeed's configuration has an optimizer of its own, which knows one learning rate; leave "
            "`optimizer` out of it, or leave the flag out."
        )


def _given_rates(arguments: Arguments) -> list[str]:
    """The flags that give some weights a learning rate of their own."""
    training, lora = arguments.training, arguments.lora
    rates = {name: getattr(training, name) for name in ("vision_lr", "resampler_lr", "embedding_lr")}
    rates["loraplus_lr_ratio"] = lora.loraplus_lr_ratio
    return [f"--{name}" for name, rate in rates.items() if rate is not None]


def _check_optimizer(training: TrainingArguments, rates: Sequence[str]) -> None:
    """Look up the optimizer and build a schedule, which transformers does only when training starts."""
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(training)
    except _ERRORS_OF_VALUES as error:
        raise UserError(f"--optim {training.optim}: {first_line(error)}") from error
    divides_itself = not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    if rates and (divides_itself or {"params", "model", "optimizer_dict"} & set(options)):
        raise UserError(
            f"{rates[0]}: --optim {training.optim} divides the weights itself; leave one of the two flags out."
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kwargs: Any = training.lr_scheduler_kwargs or {}
    try:
        transformers.get_scheduler(
            training.lr_scheduler_type, optimizer, 1, num_training_steps=10, scheduler_specific_kwargs=kwargs
        )
    except _ERRORS_OF_VALUES as error:
        name = SchedulerType(training.lr_scheduler_type).value
        raise UserError(
            f"--lr_scheduler_type {name}: {first_line(error).rstrip('.')}; see --lr_scheduler_kwargs."
        ) from error


def _installed_integrations(names: Iterable[str], announce: Callable[[str], None]) -> list[str]:
    """The integrations of `--report_to` whose packages are installed.

    The published launch scripts name tensorboard, so without its package this one is left out, with a sentence.

    Raises:
        UserError: Another one is not set up.
    """
    available = get_available_reporting_integrations()
    missing = [name for name in names if name not in available]
    for name in missing:
        if name != "tensorboard":
            raise UserError(
                f"--report_to {name}: is not set up here; leave the flag out, because metrics go to MLflow and the "
                "report."
            )
        announce("--report_to tensorboard: its package is not installed; metrics go to MLflow and the report.")
    return [name for name in names if name not in missing]


def _without_silent_controller(names: Sequence[str], announce: Callable[[str], None]) -> list[str]:
    """The integrations without `kubeflow` if Kubeflow Trainer's controller does not answer.

    transformers reports progress to the controller by itself where Trainer collects it, and then every report to an
    address that does not answer, such as behind a network policy, would stop the training for five seconds.
    """
    address = urlsplit(environment.TRAINER_SERVER.read())
    if "kubeflow" not in names or not address.hostname:
        return list(names)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), _CONTROLLER_SECONDS).close()
    except OSError as error:
        announce(
            f"Kubeflow Trainer's controller at {address.netloc} does not answer ({first_line(error)}), so it gets no "
            "progress; let the nodes connect to it if `minicpmv-finetune runs` shall show it."
        )
        return [name for name in names if name != "kubeflow"]
    return list(names)


def _shards_parameters(training: TrainingArguments) -> bool:
    config = getattr(training, "hf_deepspeed_config", None)
    return config is not None and config.is_zero3()


def _fail(message: str) -> None:
    raise UserError(f"Training arguments: {message}; see `minicpmv-finetune train --help`.")
