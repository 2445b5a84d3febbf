"""The table of all training flags, and what is checked about them without torch.

`flags.json` contains every flag of the training script with its type and choices. `docs/training_flags.py` writes it
from the script's own parser, which imports torch and transformers and takes seconds. The ranges are here.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.options import Accepted, did_you_mean, raise_mistakes, read_json

if TYPE_CHECKING:
    from minicpmv_finetune.estimate.layers import Targets
    from minicpmv_finetune.minicpmv.generations import Generation

_NEVER_EMPTY = ("model_name_or_path", "data_path", "output_dir")  # "" would be the working directory
ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "eager")
TABLE_PATH = Path(__file__).with_name("flags.json")
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_COUNT = Accepted(at_least=1, at_most=2**31 - 1)
_MAYBE_COUNT = Accepted(at_least=0, at_most=2**31 - 1)
_SHARE = Accepted(at_least=0, below=1)
_NOT_NEGATIVE = Accepted(at_least=0)
_RATE = Accepted(above=0, at_most=1)
_SEED = Accepted(at_least=0, at_most=2**32 - 1)
RANGES: Mapping[str, Accepted] = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Accepted(above=0, at_most=1),
    "data_seed": _SEED,
    "dataloader_num_workers": Accepted(at_least=0, at_most=1024),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "early_stopping_patience": _MAYBE_COUNT,
    "embedding_lr": _RATE,
    "eval_accumulation_steps": _COUNT,
    "eval_delay": _NOT_NEGATIVE,
    "eval_steps": Accepted(above=0),
    "gradient_accumulation_steps": _COUNT,
    "label_smoothing_factor": _SHARE,
    "learning_rate": _RATE,
    "local_rank": Accepted(at_least=-1, at_most=2**31 - 1),
    "logging_steps": Accepted(above=0),
    "loraplus_lr_ratio": Accepted(at_least=1, at_most=1000),
    "lora_alpha": Accepted(at_least=1, at_most=1_000_000),
    "lora_dropout": _SHARE,
    "lora_r": Accepted(at_least=1, at_most=8192),
    "max_grad_norm": _NOT_NEGATIVE,
    "max_slice_nums": Accepted(at_least=1, at_most=1000),
    "max_steps": Accepted(at_least=1, at_most=2**31 - 1, also=-1),
    "model_max_length": Accepted(at_least=1, at_most=2**20),
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "num_train_epochs": Accepted(above=0, at_most=100_000),
    "per_device_eval_batch_size": Accepted(at_least=1, at_most=65_536),
    "per_device_train_batch_size": Accepted(at_least=1, at_most=65_536),
    "resampler_lr": _RATE,
    "save_steps": Accepted(above=0),
    "save_total_limit": _COUNT,
    "seed": _SEED,
    "tokens_per_batch": _MAYBE_COUNT,
    "torch_empty_cache_steps": _COUNT,
    "vision_lr": _RATE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
}
"""Ranges of the numbers; a test makes sure that each number has one."""


@dataclass(frozen=True)
class Flag:
    """A flag of the training script.

    Attributes:
        name: Name without dashes.
        type: Type of its values; `json` is a JSON object as text, and `json_or_file` that or a file's path.
        values: How many values follow the flag; a switch may have none, and then means true.
        choices: Accepted values; empty accepts all.
        group: Part of the help; "transformers" are the flags that are not this project's own.
        default: Default value, that of the published script.
        help: Meaning of the flag.
    """

    name: str
    type: Literal["int", "float", "bool", "str", "json", "json_or_file"]
    values: Literal["one", "optional", "several", "none"]
    choices: tuple[str, ...] = ()
    group: Literal["data", "training", "adapters", "transformers"] = "transformers"
    default: Any = None
    help: str = ""

    def parse(self, words: Sequence[str]) -> Any:
        """The flag's value from the words that follow it.

        Raises:
            UserError: There are too few or too many words, or one is not accepted.
        """
        if not words and self.values in ("one", "several"):
            raise UserError(f"--{self.name}: no value; write one behind it.")
        most = {"one": 1, "optional": 1, "none": 0, "several": len(words)}[self.values]
        if len(words) > most:
            raise UserError(f"--{self.name}: {words[most]!r} is one value too many; remove it, or quote the value.")
        values = [self._parse_word(word) for word in words]
        return values if self.values == "several" else values[0] if values else True

    def _parse_word(self, word: str) -> Any:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        try:
            value = self._convert(word)
        except ValueError:
            raise UserError(
                f"--{self.name}: {word!r} is not {kinds.get(self.type, 'a JSON object')}; correct it."
            ) from None
        if not word and self.name in _NEVER_EMPTY:
            raise UserError(f"--{self.name}: empty; give a path.")
        accepted = RANGES.get(self.name) or Accepted(self.choices)
        if remedy := accepted.remedy(value):
            raise UserError(f"--{self.name}: {word} is not accepted; {remedy}.")
        return value

    def _convert(self, word: str) -> Any:
        if self.type == "bool":
            if word.lower() not in (*_TRUE, *_FALSE):
                raise ValueError(word)
            return word.lower() in _TRUE
        if self.type == "json" or (self.type == "json_or_file" and word.startswith("{")):
            value = read_json(word, f"--{self.name}")
            if not isinstance(value, dict):
                raise ValueError(word)
            return value
        return int(word) if self.type == "int" else float(word) if self.type == "float" else word


@cache
def table() -> Mapping[str, Flag]:
    """Every flag of the training script by its name."""
    rows = json.loads(TABLE_PATH.read_text())
    return {name: Flag(name, **{**row, "choices": tuple(row["choices"])}) for name, row in rows.items()}


def check_flags(argv: Sequence[str], announce: Callable[[str], None] = lambda sentence: None) -> list[str]:
    """The flags under their present names, after all checks that need no torch.

    Args:
        argv: Flags as the training script gets them; a YAML file of flags may come first.
        announce: Receives a sentence for each flag that no longer has an effect.

    Raises:
        UserError: A flag is unknown or has a wrong value, or flags contradict each other; all mistakes at once.
    """
    flags, _, mistakes = read_flags(argv, announce)
    raise_mistakes(mistakes)
    return flags


def read_flags(
    argv: Sequence[str], announce: Callable[[str], None] = lambda sentence: None
) -> tuple[list[str], dict[str, Any], list[str]]:
    """The flags under their present names, their values as far as they are accepted, and a sentence for each mistake.

    Raises:
        UserError: The YAML file of flags cannot be read.
    """
    flags = replace_removed_flags(expand_file(list(argv)), announce)
    values, mistakes = find_mistakes(flags)
    if not values.get("data_path"):
        mistakes.append("--data_path: missing; give a shards folder or the training data.")
    return flags, values, mistakes + find_contradictions(values)


def find_mistakes(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of flags by name as far as they are accepted, and a sentence for each that is not.

    Args:
        flags: Flags under their present names.
    """
    values: dict[str, Any] = {}
    mistakes = []
    for word, following in _split_at_flags(flags):
        name = word.removeprefix("--").replace("-", "_")
        flag = table().get(name)
        if not word.startswith("--"):
            mistakes.append(f"{word}: not a flag; flags begin with two dashes, such as --lora_r 16.")
        elif flag is None:
            # local_rank is torchrun's, and nearest to lora_rank, as other programs call lora_r.
            meant = did_you_mean(name, table().keys() - {"local_rank"}).replace("mean ", "mean --")
            mistakes.append(f"{word}: no such flag; {meant}see `minicpmv-finetune train --help`.")
        else:
            try:
                value = flag.parse(following)
            except UserError as error:
                mistakes.append(str(error))
            else:
                is_negation = flag.values == "none"
                values[name.removeprefix("no_") if is_negation else name] = not is_negation and value
    if str(values.get("fsdp")).lower() == "false":
        values["fsdp"] = None
    return values, mistakes


def _split_at_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it; words before the first flag stand alone."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found and found[-1][0].startswith("--"):
            found[-1][1].append(word)
        else:
            found.append((word, []))
    return found


def find_contradictions(values: Mapping[str, Any], trains_here: bool = True) -> list[str]:
    """A sentence for each pair of flags that contradict each other.

    Args:
        values: Values of flags by name; a flag that is missing has the published default.
        trains_here: Whether the training runs in this environment, so that its packages are needed here.
    """
    use_lora, tune_llm = values.get("use_lora", False), values.get("tune_llm", True)
    sentences = []
    if use_lora and tune_llm:
        sentences.append(
            "tune_llm: The model cannot simultaneously adjust LLM parameters and apply LoRA; set tune_llm to false to "
            "train adapters, or use_lora to false to train the language model's own weights."
        )
    if values.get("q_lora") and not use_lora:
        sentences.append("--q_lora trains adapters on a 4-bit model and needs --use_lora true.")
    sentences += _find_unfit_for_rows(values)
    if values.get("early_stopping_patience") and values.get("eval_strategy", "no") == "no":
        sentences.append(
            "--early_stopping_patience: nothing is evaluated; give --eval_strategy epoch, or steps with --eval_steps."
        )
    is_raw = str(values.get("data_path") or "").endswith((".json", ".jsonl"))
    if is_raw and values.get("eval_strategy", "no") != "no" and not values.get("eval_data_path"):
        sentences.append(
            f"--eval_strategy {values['eval_strategy']}: nothing is held out of raw training data; give "
            "--eval_data_path, or leave the flag out."
        )
    if values.get("lora_weight_path") and not use_lora:
        sentences.append("--lora_weight_path: an adapter is given, but no adapter is trained; give --use_lora true.")
    sentences += _find_contradicting_adapters(values)
    metric = values.get("metric_for_best_model")
    if metric and str(metric).removeprefix("eval_") not in _METRICS:
        sentences.append(f"--metric_for_best_model {metric}: is not measured; give {' or '.join(_METRICS)}.")
    if values.get("save_strategy") == "best" and not metric:
        sentences.append("--save_strategy best: give --metric_for_best_model loss too.")
    if values.get("optim_args") and not all("=" in pair for pair in str(values["optim_args"]).split(",")):
        sentences.append(f"--optim_args {values['optim_args']}: give NAME=VALUE, several separated by commas.")
    sentences += _find_clashes(values)
    sentences += _missing_packages(values) if trains_here else []
    schedule = str(values.get("lr_scheduler_type", ""))
    needed = _SCHEDULES.get(schedule, ())
    if needed and not set(needed) & set(_keys(values.get("lr_scheduler_kwargs"))):
        sentences.append(f"--lr_scheduler_type {schedule}: give {' or '.join(needed)} in --lr_scheduler_kwargs.")
    try:
        re.compile(str(values.get("lora_target_modules") or ""))
    except re.error as error:
        sentences.append(f"--lora_target_modules: is no regular expression ({error}); correct it.")
    layers = values.get("lora_layers_to_transform")
    if layers is not None and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", str(layers)):
        sentences.append(f"--lora_layers_to_transform {layers}: give layer numbers such as 0,1,5.")
    refused = [(name, value) for name, value in _REFUSED if name in values and values[name] is value]
    return sentences + [f"--{name} {str(value).lower()}: {_REFUSED[name, value]}." for name, value in refused]


def _find_unfit_for_rows(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag that does not go with several samples in a row."""
    sentences = []
    for name in (name for name in ("packing", "tokens_per_batch", "share_images") if values.get(name)):
        if values.get("train_sampling_strategy", "random") != "random":
            sentences.append(
                f"--{name} leaves no padding that batches of similar lengths could save; leave --group_by_length out."
            )
        if values.get("attn_implementation") == "eager":
            sentences.append(
                f"--{name}: eager attention cannot keep the samples of a row apart; leave --attn_implementation out."
            )
    if values.get("share_images") and str(values.get("attn_implementation")).startswith("flash"):
        sentences.append(
            "--share_images: flash attention cannot let several samples see one image; leave --attn_implementation out."
        )
    return sentences


def _find_clashes(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each combination that transformers refuses, one at a time and after it has been imported."""

    def value(name: str) -> Any:
        return values.get(name, table()[name].default)

    sentences = [
        f"--bf16{full} and --fp16{full}: choose one of the two."
        for full in ("", "_full_eval")
        if values.get(f"bf16{full}") and values.get(f"fp16{full}")
    ]
    evaluated, saved = value("eval_strategy"), value("save_strategy")
    sentences += _find_unsaved_best(value) if saved != "best" else []
    schedule = value("lr_scheduler_type")
    if schedule in ("reduce_lr_on_plateau", "greedy") and evaluated == "no":
        sentences.append(f"--lr_scheduler_type {schedule}: nothing is evaluated; give --eval_strategy epoch.")
    for strategy in ("logging", "eval", "save"):
        steps = values.get(f"{strategy}_steps")
        if value(f"{strategy}_strategy") == "steps" and steps and steps > 1 and steps != int(steps):
            sentences.append(f"--{strategy}_steps {steps:g}: above 1 it must be a whole number of steps.")
    if values.get("dataloader_num_workers") == 0:
        sentences += [
            f"--{name}: there are no workers; give --dataloader_num_workers, or leave the flag out."
            for name in ("dataloader_prefetch_factor", "dataloader_multiprocessing_context")
            if values.get(name)
        ]
    if values.get("q_lora") and values.get("strategy") in ("zero3", "fsdp2"):
        sentences.append(PARTITIONED_4_BIT)
    return sentences


def _find_unsaved_best(value: Callable[[str], Any]) -> list[str]:
    """A sentence if the best weights shall be kept, but are not always saved when they are evaluated."""
    flag = next((name for name in ("load_best_model_at_end", "early_stopping_patience") if value(name)), "")
    evaluated, saved = value("eval_strategy"), value("save_strategy")
    is_alone = flag == "early_stopping_patience" and evaluated == "no"  # which has a sentence of its own
    if not flag or is_alone:
        return []
    if evaluated != saved:
        return [
            f"--{flag}: needs a checkpoint at each evaluation, but --eval_strategy is {evaluated} and --save_strategy "
            f"{saved}; give both the same."
        ]
    every, each = value("eval_steps"), value("save_steps")
    if evaluated == "steps" and every and min(every, each) >= 1 and each % every:
        return [
            f"--{flag}: needs checkpoints at evaluations only, but --save_steps {each:g} is no multiple of "
            f"--eval_steps {every:g}; change one of them."
        ]
    return []


def _find_contradicting_adapters(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag of the adapters' kind or place that another one contradicts."""
    given = [name for name in _OF_ADAPTERS if str(values.get(name)).lower() not in ("none", "false", "", "true")]
    given += [name for name in ("use_dora", "use_rslora") if values.get(name)]
    if not values.get("use_lora"):
        return [f"--{name}: no adapter is trained; give --use_lora true, or leave the flag out." for name in given]
    sentences = []
    targets = target_parts(str(values.get("lora_targets") or ""))
    if unknown := sorted(targets - {"llm", "resampler", "vision"}):
        sentences.append(f"--lora_targets {','.join(unknown)}: no such part; give some of llm, resampler and vision.")
    if "vision" in targets and values.get("tune_vision"):
        sentences.append(
            "--lora_targets vision: --tune_vision true trains the vision tower whole; give --tune_vision false to "
            "train its adapters, or leave vision out."
        )
    for name in _OF_LANGUAGE_MODEL if targets and "llm" not in targets else ():
        if values.get(name) not in (None, "", table()[name].default):
            sentences.append(
                f"--{name}: chooses layers of the language model, but --lora_targets does not name llm; add llm, or "
                "leave one of the two out."
            )
    init, quantized = str(values.get("init_lora_weights") or "true").lower(), values.get("q_lora")
    if not re.fullmatch(r"true|pissa|pissa_niter_[1-9]\d?|lora_ga", init):
        sentences.append(f"--init_lora_weights {init}: unknown; give true, pissa, pissa_niter_16 or lora_ga.")
    elif init != "true":
        sentences += [f"--init_lora_weights {init}: {reason}." for reason in _unfit_for_new_weights(values)]
    if values.get("use_dora") and quantized and (values.get("deepspeed") or values.get("strategy", "ddp") != "ddp"):
        sentences.append("--use_dora with --q_lora: DeepSpeed cannot train it; use --strategy ddp.")
    return sentences


def _unfit_for_new_weights(values: Mapping[str, Any]) -> Iterator[str]:
    """Why an initialization that changes the base's weights is impossible."""
    if values.get("q_lora"):
        yield "changes the base's weights, which 4-bit weights cannot follow; leave one of this flag and --q_lora out"
    if values.get("strategy") in ("zero3", "fsdp2") or (values.get("fsdp") and not values.get("deepspeed")):
        yield PARTITIONED_WEIGHTS
    if values.get("lora_layer_replication"):
        yield "changes the base's weights, which replicated layers share; leave one of the two flags out"
    if values.get("lora_weight_path"):
        yield "the adapter of --lora_weight_path has begun already; leave one of the two flags out"


PARTITIONED_WEIGHTS = "needs whole weights, but zero3 and FSDP partition them; use --strategy ddp or zero2"
_OF_LANGUAGE_MODEL = ("lora_target_modules", "lora_layers_to_transform")
_OF_ADAPTERS = ("lora_targets", "init_lora_weights", "loraplus_lr_ratio", "lora_layer_replication")


def target_parts(text: str) -> set[str]:
    """The parts that `--lora_targets` names; `merger` is the resampler of 4.6 and 4.7."""
    parts = {part.strip() for part in text.split(",") if part.strip()}
    return {"resampler" if part == "merger" else part for part in parts}


def adapter_targets(values: Mapping[str, Any]) -> "Targets":
    """The layers that get adapters.

    Args:
        values: Values of flags by name, which have been checked.
    """
    from minicpmv_finetune.estimate.layers import Targets

    numbers = values.get("lora_layers_to_transform")
    return Targets(
        str(values.get("lora_target_modules") or ""),
        frozenset(target_parts(str(values.get("lora_targets") or ""))),
        None if numbers in (None, "") else frozenset(map(int, str(numbers).split(","))),
        str(values.get("lora_layers_pattern") or "layers"),
        str(values.get("lora_layer_replication") or ""),
    )


def trained_twice(expression: str, layer: str, module: str, flag: str) -> str:
    """A sentence for a layer that has an adapter by one flag, and is part of a module trained whole by another."""
    remedy = "give --tune_vision false to train its adapters" if "tune_vision" in flag else f"leave it out of {flag}"
    return (
        f"--lora_target_modules {expression!r}: matches {layer}, but {flag} trains {module} whole; {remedy}, or narrow "
        "the expression."
    )


def find_unfit_flags(values: Mapping[str, Any], generation: "Generation", experts: int = 0) -> list[str]:
    """A sentence for each flag that a base model of this generation cannot honor.

    Args:
        values: Values of flags by name.
        generation: Generation of the base model.
        experts: Number of experts in each layer, if the base model is a mixture of experts.
    """
    sentences = []
    if values.get("q_lora") and experts:
        sentences.append(
            f"--q_lora: the base model's {experts} experts a layer are one tensor, which cannot be loaded in 4 bits; "
            "train LoRA without --q_lora, on several GPUs by --strategy zero3 or fsdp2."
        )
    llm_type = values.get("llm_type")
    if llm_type not in {None, "", generation.llm_type, *generation.older_llm_types}:
        sentences.append(
            f"--llm_type {llm_type} contradicts the checkpoint: MiniCPM-V {generation.version} uses "
            f"{generation.llm_type}; leave the flag out or correct it."
        )
    if values.get("use_lora") and values.get("lora_layer_replication") and not generation.interchangeable_layers:
        sentences.append(
            f"--lora_layer_replication: MiniCPM-V {generation.version} mixes linear and full attention in a fixed "
            "order, which replicated layers would break; leave the flag out."
        )
    return sentences


def find_flags_without_gpu(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag that needs a GPU, where the training would surely run without one.

    The training itself asks torch; this tells it sooner, by the files of devices.

    Args:
        values: Values of flags by name.
    """
    may_have_gpu = sys.platform != "linux" or any(Path(device).exists() for device in _GPU_DEVICES)
    if may_have_gpu and not values.get("use_cpu"):
        return []
    uses_fsdp = values.get("strategy") == "fsdp2" or (values.get("fsdp") and not values.get("deepspeed"))
    needed = {
        FP16_WITHOUT_GPU: values.get("fp16"),
        FSDP_WITHOUT_GPU: uses_fsdp,
        FLASH_WITHOUT_GPU: str(values.get("attn_implementation") or "").startswith("flash"),
        LIGER_WITHOUT_GPU: values.get("use_liger_kernel"),
        NCCL_WITHOUT_GPU: values.get("ddp_backend") == "nccl",
    }
    return [sentence for sentence, is_given in needed.items() if is_given]


def find_missing_gpus(processes: int | None) -> list[str]:
    """A sentence if there are fewer GPUs than training processes; without a GPU they train on the CPU."""
    gpus = len(list(_DEVICES.glob("nvidia[0-9]*")))
    if not gpus or (processes or 1) <= gpus:
        return []
    return [f"nproc_per_node is {processes}, but this machine has {gpus} GPU{'s' * (gpus > 1)}; give at most {gpus}."]


PARTITIONED_4_BIT = (
    "--q_lora: ZeRO-3 and FSDP partition weights, which is impossible for 4-bit weights; use --strategy ddp or zero2, "
    "or train LoRA without q_lora."
)
FP16_WITHOUT_GPU = "--fp16: needs a GPU, and there is none; leave it out, or give --bf16 true."
FLASH_WITHOUT_GPU = "--attn_implementation: flash attention runs on a GPU, and there is none; leave the flag out."
FSDP_WITHOUT_GPU = "--strategy fsdp2: FSDP needs GPUs, and there are none; use ddp, zero2 or zero3."
LIGER_WITHOUT_GPU = "--use_liger_kernel: its kernels run on a GPU, and this machine has none; leave the flag out."
NCCL_WITHOUT_GPU = "--ddp_backend nccl: connects GPUs, and there are none; leave the flag out."
_DEVICES = Path("/dev")
# Of NVIDIA (also in Windows' subsystem and on Jetson), AMD, Intel, Habana and Huawei.
_GPU_DEVICES = (
    "/dev/nvidiactl",
    "/dev/dxg",
    "/dev/nvmap",
    "/dev/kfd",
    "/dev/dri",
    "/dev/accel",
    "/dev/davinci_manager",
)


def _missing_packages(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each optimizer, attention or tracker whose package is not installed."""
    optimizer = str(values.get("optim") or "")
    trackers = str(values.get("report_to") or "").replace("[", " ").replace("]", " ").replace(",", " ").split()
    wanted = {f"--optim {optimizer}": package for start, package in _OPTIMIZERS.items() if optimizer.startswith(start)}
    attention = str(values.get("attn_implementation") or "")
    wanted |= {f"--attn_implementation {attention}": _FLASH[attention]} if attention in _FLASH else {}
    wanted |= {f"--report_to {name}": _TRACKERS[name] for name in trackers if name in _TRACKERS}
    unknown = [name for name in trackers if name not in (*_TRACKERS, *_ALWAYS_ACCEPTED_TRACKERS)]
    return [
        *(f"--report_to {name}: unknown; {did_you_mean(name, _TRACKERS)}leave the flag out." for name in unknown),
        *(
            f"{flag}: the package {package} is not installed; leave the flag out, or install the package."
            for flag, package in wanted.items()
            if find_spec(package) is None
        ),
    ]


def _keys(document: Any) -> list[str]:
    """The keys of a JSON object that a flag contains."""
    try:
        parsed = json.loads(document) if isinstance(document, str) else document
    except ValueError:
        return []
    return list(parsed) if isinstance(parsed, dict) else []


_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_OPTIMIZERS = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
}
_TRACKERS = {
    **{name: name for name in ("wandb", "comet_ml", "swanlab", "trackio", "neptune", "clearml", "dvclive", "mlflow")},
    **{"azure_ml": "azureml", "dagshub": "dagshub", "codecarbon": "codecarbon"},
}
# Kubeflow's is built in; without TensorBoard's package, which the published launch scripts name, it is left out.
_ALWAYS_ACCEPTED_TRACKERS = ("all", "none", "tensorboard", "kubeflow")
_SCHEDULES = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
_METRICS = ("loss", "token_accuracy")
_REFUSED = {
    ("do_train", False): "this command trains, and evaluate is a step of its own; leave the flag out",
    ("push_to_hub", True): "publishing is a step of its own; leave the flag out, and upload the merged folder",
    ("save_only_model", True): "such a checkpoint cannot be continued; leave the flag out",
    ("batch_eval_metrics", True): "the token accuracy is computed over the whole evaluation; leave the flag out",
    ("auto_find_batch_size", True): "the batch size is part of the training's record; give one that `plan` recommends",
    ("enable_jit_checkpoint", True): "every training saves its state on SIGTERM; leave the flag out",
}
"""Flags that transformers accepts and this step cannot honor, with the reason and the remedy."""

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # in transformers 5 it may be a fraction
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_WITHOUT_EFFECT = {
    "logging_dir": "metrics go to MLflow and the report",
    "overwrite_output_dir": "a result is replaced as a whole, and only a result of train",
    "save_safetensors": "safetensors is the only format",
    "include_inputs_for_metrics": "evaluation during training needs no inputs",
    "use_legacy_prediction_loop": "there is only one loop",
    "dispatch_batches": "every process reads its own rows",
    "split_batches": "every process reads its own rows",
    "push_to_hub_model_id": "publishing is a step of its own",
    "push_to_hub_organization": "publishing is a step of its own",
    "push_to_hub_token": "publishing is a step of its own",
    "xpu_backend": "the backend follows from the device",
    "half_precision_backend": "torch's own backend is the only one",
    "fp16_backend": "torch's own backend is the only one",
    "fp16_opt_level": "torch's own mixed precision has no levels",
    "jit_mode_eval": "transformers no longer has this mode",
    "use_ipex": "transformers no longer has this mode",
    "ray_scope": "hyperparameter search is outside this script",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "past_index": "the models need no past state",
}
_GROUPED_BY_LENGTH = "group_by_length"


def expand_file(argv: list[str]) -> list[str]:
    """Put a configuration file's flags before those of the command line, which take precedence."""
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return argv
    from minicpmv_finetune.yaml_files import read_mapping

    document = read_mapping(Path(argv[0]), "flags by name", "write one flag per line, such as `lora_r: 16`")
    return [*as_flags(document), *argv[1:]]


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Convert a mapping to a command line: `{"lora_r": 16}` becomes `--lora_r 16`."""
    flags: list[str] = []
    for name, value in settings.items():
        if value is None or value == "":
            continue
        flags.append(f"--{name}")
        plain = _with_whole_numbers(value)
        if isinstance(plain, dict):
            flags.append(json.dumps(plain, default=str))  # YAML has dates too
        else:
            flags += [str(item) for item in plain] if isinstance(plain, list) else [str(plain)]
    return flags


def pop_num_nodes(settings: dict[str, Any]) -> int:
    """Remove the number of nodes from the pipeline's training flags; the script has no such flag.

    Raises:
        UserError: The number is not a whole number above zero.
    """
    wanted = _with_whole_numbers(settings.pop("num_nodes", 1))
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"training_flags: num_nodes is {wanted!r}; give a whole number of nodes, such as 2.")
    return wanted


def take_processes(flags: Sequence[str]) -> tuple[list[str], int | None]:
    """Separate the number of processes a node, which is torchrun's flag, from the training script's own flags.

    Returns:
        The script's flags; and the number, None where it is not given.

    Raises:
        UserError: The number is not a whole number above zero.
    """
    kept = list(flags)
    if _PROCESSES not in kept:
        return kept, None
    at = kept.index(_PROCESSES)
    given = kept[at + 1 : at + 2]
    if not given or not given[0].isdecimal() or int(given[0]) < 1:
        raise UserError(
            f"nproc_per_node is {given[0] if given else 'empty'}; give a whole number of processes a node, such as 2."
        )
    del kept[at : at + 2]
    return kept, int(given[0])


_PROCESSES = "--nproc_per_node"


def _with_whole_numbers(value: Any) -> Any:
    """Convert floats without a fraction: Kubeflow passes every number of a JSON object as a float, but flags need 2."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def replace_removed_flags(flags: list[str], announce: Callable[[str], None]) -> list[str]:
    """Replace flags that transformers 5 removed, or announce that they have no effect."""
    result: list[str] = []
    position = 0
    while position < len(flags):
        name, equals, value = flags[position].removeprefix("--").partition("=")
        is_flag = flags[position].startswith("--")
        name = name.replace("-", "_") if is_flag else name
        # A switch may have no value; otherwise the following words are its values.
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
        elif name in RENAMED:
            result += [f"--{RENAMED[name]}", *values]
        else:
            result += [f"--{name}", *values]
        position = end
    return result
