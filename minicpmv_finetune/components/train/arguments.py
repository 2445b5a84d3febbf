"""The flags of the published finetune.py, same names and defaults, on top of every transformers.TrainingArguments flag.

Flags that transformers 5 removed are mapped to today's, or refused with one sentence; a launch script written for the
published Python file keeps working.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import HfArgumentParser

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.generations import PUBLISHED_LORA_TARGETS

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
_STRATEGY_FOLDER = Path(__file__).parent / "strategies"


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = field(
        default="openbmb/MiniCPM-V-4.6", metadata={"help": "Base checkpoint: a folder, an s3:// URI or a hub id."}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(
        default="", metadata={"help": "Training data: a shards folder, or raw JSON, which is prepared first."}
    )
    eval_data_path: str = field(
        default="", metadata={"help": "Evaluation data as raw JSON; with a shards folder its own eval split is used."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; every transformers.TrainingArguments flag is accepted too."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded checkpoints are kept."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer."})
    model_max_length: int = field(
        default=2048,
        metadata={"help": "Longest sample in tokens; longer ones are rejected in preprocessing, never cut."},
    )
    tune_vision: bool = field(default=True, metadata={"help": "Train the vision tower."})
    tune_llm: bool = field(default=True, metadata={"help": "Train the language model's own weights."})
    llm_type: str | None = field(
        default=None,
        metadata={
            "help": "Published name of the chat format (minicpm, llama3, qwen); derived from the checkpoint, and "
            "checked against it when given."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters on the language model."})
    max_slice_nums: int = field(default=9, metadata={"help": "Most slices of an image."})
    # The collator needs every column.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept for compatibility; always false."})

    strategy: str = field(
        default="ddp",
        metadata={
            "choices": list(STRATEGIES),
            "help": "How several processes share the work: a copy of the model each (ddp; also for one process), or "
            "DeepSpeed's zero2 or zero3, or fsdp2. A --deepspeed or --fsdp configuration of your own goes before it.",
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute in bfloat16; by default where the GPU can and fp16 was not asked for."}
    )
    dataloader_persistent_workers: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Keep the loader's workers from one epoch to the next; by default where there are any."},
    )
    checkpoint_uri: str = field(
        default="",
        metadata={
            "help": "Where checkpoints are kept and found again, a folder or s3:// URI; by default beside output_dir "
            "until the training is over."
        },
    )
    supervised_logits_only: bool = field(
        default=True,
        metadata={"help": "Compute logits only where something is learnt; loss and gradients are the same."},
    )
    fused_lora: bool = field(
        default=True,
        metadata={"help": "Compute a layer and its adapter in one step; loss and gradients are the same."},
    )
    reuse_vision_features: bool = field(
        default=True,
        metadata={
            "help": "Compute what a frozen vision tower sees once and keep it in --cache_dir, where training runs over "
            "the data more than once; needs --tune_vision false."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put several samples into one row of at most model_max_length tokens, without padding and without "
            "their seeing each other; the batch size then counts such rows."
        },
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better loss; 0 never stops early."}
    )

    def __post_init__(self) -> None:
        """Complete the arguments as transformers does."""
        # Said outright, since without a GPU transformers takes a DeepSpeed run for a single process.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.ddp_find_unused_parameters is None:
            # All take part in every step: where a batch has no image the models run a blank one.
            self.ddp_find_unused_parameters = False
        # Starting them anew each epoch took a fifth of the training from stored features of a small model.
        self.dataloader_persistent_workers = (
            self.dataloader_num_workers > 0 and self.dataloader_persistent_workers is not False
        )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_bf16_supported()
        if not self.deepspeed and not self.fsdp:
            if self.strategy in ("zero2", "zero3"):
                self.deepspeed = str(_STRATEGY_FOLDER / f"{self.strategy}.json")
            elif self.strategy == "fsdp2":
                self.fsdp = "full_shard auto_wrap"
                self.fsdp_config = str(_STRATEGY_FOLDER / "fsdp2.json")
        if self.early_stopping_patience:
            self.load_best_model_at_end = True
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"
        super().__post_init__()


@dataclass
class LoraArguments:
    """Which adapters are trained."""

    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale; the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: str = field(
        default=PUBLISHED_LORA_TARGETS,
        metadata={"help": "Regular expression of module names; `llm.` means the language model in every generation."},
    )
    lora_weight_path: str = field(default="", metadata={"help": "Continue from this adapter."})
    lora_bias: str = field(default="none", metadata={"help": "Biases to train: none, all or lora_only."})
    q_lora: bool = field(default=False, metadata={"help": "Load the language model in 4 bits."})
    lora_modules_to_save: str = field(
        default="",
        metadata={
            "help": "Modules trained and saved whole beside embeddings and merger, separated by commas; `none` leaves "
            "those two frozen."
        },
    )
    lora_layer_replication: str | None = field(
        default=None, metadata={"help": "Stack the language model's layers from ranges, such as 0:4,2:6."}
    )
    lora_layers_to_transform: str | None = field(
        default=None, metadata={"help": "Only these layers of the language model get adapters, such as 0,1,5."}
    )
    lora_layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the list of layers that lora_layers_to_transform counts in."}
    )


@dataclass(frozen=True)
class Arguments:
    """All groups, parsed and checked."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments


_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # transformers 5 takes a fraction there
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_WITHOUT_EFFECT = {
    "logging_dir": "curves go to MLflow and the report",
    "overwrite_output_dir": "a finished result is always replaced as a whole",
    "save_safetensors": "safetensors is the only format",
    "include_inputs_for_metrics": "evaluation during training needs no inputs",
    "use_legacy_prediction_loop": "there is only one loop",
    "dispatch_batches": "every process reads its own rows",
    "split_batches": "every process reads its own rows",
    "push_to_hub_model_id": "publishing is a step of its own",
    "push_to_hub_organization": "publishing is a step of its own",
    "push_to_hub_token": "publishing is a step of its own",
    "xpu_backend": "the backend follows from the device",
    "half_precision_backend": "torch's own is the only one",
    "fp16_backend": "torch's own is the only one",
    "fp16_opt_level": "torch's own mixed precision has no levels",
    "jit_mode_eval": "transformers has no such mode any more",
    "use_ipex": "transformers has no such mode any more",
    "ray_scope": "hyperparameter search is outside this script",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "past_index": "the models need no past state",
}
_GROUPED_BY_LENGTH = "group_by_length"


def parser() -> HfArgumentParser:
    """The parser of all groups; its help lists every flag."""
    return HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments, LoraArguments),  # type: ignore[arg-type]
        prog="minicpmv-finetune train",
        allow_abbrev=False,
    )


def parse(argv: Sequence[str], announce: Callable[[str], None] = print) -> Arguments:
    """Read a published launch script's flags.

    Args:
        argv: without the program's name; a YAML file of flags may come first.
        announce: takes a sentence for each flag that was mapped or has no effect any more.

    Raises:
        UserError: an unknown flag or value, or flags that contradict each other.
    """
    flags = _modernised(_with_file(list(argv)), announce)
    instance = parser()
    known = {option for action in instance._actions for option in action.option_strings}
    unknown = [flag for flag in flags if flag.startswith("--") and flag.split("=")[0] not in known]
    if unknown:
        raise UserError(f"{unknown[0]}: no such flag; see `minicpmv-finetune train --help`.")
    instance.error = _refuse  # type: ignore[method-assign, assignment]
    try:
        groups = instance.parse_args_into_dataclasses(args=flags)
    except (ValueError, ImportError) as error:
        raise UserError(f"Training arguments: {str(error).strip().splitlines()[0]}") from error
    arguments = Arguments(*groups)
    _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    training = arguments.training
    if not arguments.data.data_path:
        raise UserError("--data_path: missing; give a shards folder or the training data.")
    if training.use_lora and training.tune_llm:
        raise UserError("The model cannot simultaneously adjust LLM parameters and apply LoRA.")
    if training.fsdp and training.use_cpu:
        # accelerate would train plain DDP there without a word.
        raise UserError("--strategy fsdp2: FSDP needs GPUs here; without any use ddp, zero2 or zero3.")
    if arguments.lora.q_lora:
        if not training.use_lora:
            raise UserError("--q_lora trains adapters on a 4-bit model and needs --use_lora true.")
        if training.fsdp or _shards_parameters(training):
            raise UserError(
                "--q_lora: ZeRO-3 and FSDP cut weights into parts, which 4-bit weights do not allow; use --strategy "
                "ddp or zero2, or train LoRA without q_lora."
            )
    if training.packing and training.train_sampling_strategy != "random":
        raise UserError(
            "--packing leaves no padding that batches of like length would save; leave --group_by_length out."
        )
    if training.early_stopping_patience and training.eval_strategy == "no":
        raise UserError(
            "--early_stopping_patience: nothing is evaluated; give --eval_strategy and --eval_steps or epoch too."
        )


def _shards_parameters(training: TrainingArguments) -> bool:
    config = getattr(training, "hf_deepspeed_config", None)
    return config is not None and config.is_zero3()


def _with_file(argv: list[str]) -> list[str]:
    """Put a configuration file's flags before those of the command line, which go first."""
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return argv
    path = Path(argv[0])
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file of training flags.") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise UserError(f"{path}: invalid YAML{line}; write one flag a line, such as `lora_r: 16`.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold flags by name, such as `lora_r: 16`.")
    return [*as_flags(document), *argv[1:]]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as a mapping: `{"lora_r": 16}` becomes `--lora_r 16`."""
    flags: list[str] = []
    for name, value in settings.items():
        if value is None or value == "":
            continue
        flags.append(f"--{name}")
        plain = _with_whole_numbers(value)
        if isinstance(plain, dict):
            flags.append(json.dumps(plain))
        else:
            flags += [str(item) for item in plain] if isinstance(plain, list) else [str(plain)]
    return flags


def pop_num_nodes(settings: dict[str, Any]) -> int:
    """Take the number of nodes out of the pipeline's training flags; it is no flag of the script.

    Raises:
        UserError: it is no whole number above zero.
    """
    wanted = _with_whole_numbers(settings.pop("num_nodes", 1))
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"training_flags: num_nodes is {wanted!r}; give a whole number of nodes, such as 2.")
    return wanted


def _with_whole_numbers(value: Any) -> Any:
    """Kubeflow hands every number of a JSON object on as a float; flags that count want 2, not 2.0."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _modernised(flags: list[str], announce: Callable[[str], None]) -> list[str]:
    """Replace flags that transformers 5 removed."""
    result: list[str] = []
    position = 0
    while position < len(flags):
        name, equals, value = flags[position].removeprefix("--").partition("=")
        is_flag = flags[position].startswith("--")
        # A switch may stand alone; else the next word is its value.
        values = [value] if equals else []
        end = position + 1
        if is_flag and not equals:
            while end < len(flags) and not flags[end].startswith("--"):
                values.append(flags[end])
                end += 1
        if not is_flag:
            result.append(flags[position])
        elif name in _WITHOUT_EFFECT:
            if name == "save_safetensors" and values and values[0].lower() in {"false", "0", "no"}:
                raise UserError("--save_safetensors false: pickled weights are not written; leave the flag out.")
            announce(f"--{name} has no effect: {_WITHOUT_EFFECT[name]}.")
        elif name == _GROUPED_BY_LENGTH:
            if not values or values[0].lower() in {"true", "1", "yes"}:
                result += ["--train_sampling_strategy", "group_by_length"]
        elif name in _RENAMED:
            result += [f"--{_RENAMED[name]}", *values]
        else:
            result += [f"--{name}", *values]
        position = end
    return result


def _refuse(message: str) -> None:
    raise UserError(f"Training arguments: {message}; see `minicpmv-finetune train --help`.")
