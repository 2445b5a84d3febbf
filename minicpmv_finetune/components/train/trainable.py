"""Which parts of the model are trained: full weights, adapters, and modules trained whole beside the adapters."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.estimate.layers import layer_ranges, stacked_names
from minicpmv_finetune.minicpmv.adapters import PEFT_PREFIX, put_adapter, read_adapter_config, update_layer_types
from minicpmv_finetune.minicpmv.generations import PUBLISHED_LORA_TARGETS, Generation, count_experts
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record

from .arguments import Arguments, LoraArguments, TrainingArguments
from .flags import find_unfit_flags, target_parts, trained_twice
from .initial_adapter import changes_base, require_rank


def make_trainable(model: PreTrainedModel, generation: Generation, arguments: Arguments) -> PreTrainedModel | PeftModel:
    """Freeze the parts that are not tuned, and put adapters on the language model if the flags ask for them.

    Args:
        model: The loaded base model.
        generation: The model's generation.
        arguments: `tune_vision`, `tune_llm`, `use_lora` and every `lora_*` take effect here.

    Returns:
        The model itself, or PEFT's wrapper around it.

    Raises:
        UserError: The arguments contradict the model.
    """
    unused = generation.unused_modules(model.config.to_dict())
    trained = _make_parts_trainable(model, generation, arguments)
    # DDP waits for the gradient of every trained parameter; PEFT copies a tower that is trained whole with all of them.
    for name, parameter in trained.named_parameters():
        path = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".")
        if any(_is_inside(path, module) for module in unused):
            parameter.requires_grad_(False)
    return trained


def _make_parts_trainable(
    model: PreTrainedModel, generation: Generation, arguments: Arguments
) -> PreTrainedModel | PeftModel:
    training, lora = arguments.training, arguments.lora
    experts = count_experts(model.config.to_dict())
    raise_mistakes(find_unfit_flags({**vars(training), **vars(lora)}, generation, experts))
    if not training.tune_vision:
        model.get_submodule(generation.vision_tower).requires_grad_(False)
    if not training.tune_llm:
        model.get_submodule(generation.language_model).requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if not training.use_lora:
        return model
    if lora.lora_weight_path:
        return _continue_adapter(model, generation, arguments)
    with warnings.catch_warnings():
        # PEFT reads this attribute by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # PEFT would make adapters float32; DeepSpeed keeps such copies itself, and gathers only weights of one type.
        in_float32 = not training.deepspeed
        config = lora_config(model, generation, arguments)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    update_layer_types(model)
    if changes_base(lora):
        require_rank(adapted, lora)
    if generation.vision_tower not in (config.modules_to_save or ()):
        # lora_bias "all" would train the biases of the vision tower too; adapters on the tower are trained.
        for name, parameter in model.get_submodule(generation.vision_tower).named_parameters():
            if "lora_" not in name:
                parameter.requires_grad_(False)
    return adapted


def check_continued_adapter(arguments: Arguments, base_fingerprint: str) -> None:
    """Refuse an adapter of `--lora_weight_path` that is damaged, or was trained on another base model.

    Raises:
        UserError: There is no such adapter, or it does not belong to the base model.
    """
    if arguments.lora.lora_weight_path:
        folder = _adapter_folder(arguments)
        read_adapter_config(folder)
        if (folder / RECORD_FILE).is_file():
            read_record(folder).require_base(folder, arguments.model.model_name_or_path, base_fingerprint)


def _adapter_folder(arguments: Arguments) -> Path:
    address = arguments.lora.lora_weight_path
    return storage.fetch(address) if storage.is_object_uri(address) else storage.local_path(address)


def _continue_adapter(model: PreTrainedModel, generation: Generation, arguments: Arguments) -> PeftModel:
    """Put an existing adapter on the model, to train it further; flags that contradict it are refused."""
    folder = _adapter_folder(arguments)
    config, wanted = read_adapter_config(folder), lora_config(model, generation, arguments)
    names = [name for name, _ in model.named_modules()]
    layers = _linear_layers(model, generation, arguments.lora)
    whole = _outermost(name for name in names for end in config["modules_to_save"] or () if name.endswith(end))
    flagged_whole = sorted(wanted.modules_to_save or ())
    pairs: dict[str, tuple[object, object]] = {
        "lora_r": (wanted.r, config["r"]),
        "lora_alpha": (wanted.lora_alpha, config["lora_alpha"]),
        "lora_dropout": (wanted.lora_dropout, config["lora_dropout"]),
        "lora_bias": (wanted.bias, config["bias"]),
        "use_dora": (wanted.use_dora, config["use_dora"]),
        "use_rslora": (wanted.use_rslora, config["use_rslora"]),
        "lora_layer_replication": (_pairs(wanted.layer_replication), _pairs(config["layer_replication"])),
        "lora_target_modules": (
            _select(layers, wanted.target_modules, wanted.modules_to_save),
            _select(layers, config["target_modules"], whole),
        ),
        "lora_modules_to_save": (flagged_whole, whole),
        "tune_vision": (generation.vision_tower in flagged_whole, generation.vision_tower in whole),
    }
    pairs["lora_layers_to_transform"] = pairs["lora_targets"] = pairs["lora_target_modules"]
    others = [flag for flag, (flagged, trained) in pairs.items() if flag in arguments.given and flagged != trained]
    if others:
        raise UserError(
            f"--lora_weight_path {arguments.lora.lora_weight_path}: the adapter was trained with other "
            f"{', '.join(f'--{flag}' for flag in others)}; leave out what shall stay as in the adapter, or leave out "
            "--lora_weight_path to train a new one."
        )
    return put_adapter(model, folder, arguments.model.model_name_or_path, is_trainable=True)


def _pairs(ranges: Any) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in ranges or ()]


def _select(layers: Sequence[str], targets: Any, whole: Iterable[str] | None) -> list[str]:
    """The linear layers that an adapter's configuration selects, without those that are trained whole."""
    wanted = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(end)}" for end in targets or ()]
    found = [name for name in layers if any(re.fullmatch(pattern, name) for pattern in wanted)]
    return [name for name in found if not any(_is_inside(f"{name}.", other) for other in whole or ())]


def _outermost(names: Iterable[str]) -> list[str]:
    different = sorted(set(names))
    return [name for name in different if not any(_is_inside(name, other) for other in different)]


def lora_config(model: PreTrainedModel, generation: Generation, arguments: Arguments) -> LoraConfig:
    """The PEFT configuration that the `lora_*` arguments describe, with this generation's module names.

    Raises:
        UserError: The arguments contradict the model.
    """
    lora = arguments.lora
    pattern, adapted = _adapted_layers(model, generation, lora)
    whole = _modules_to_save(model, generation, arguments, adapted)
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.lora_bias,  # type: ignore[arg-type]
        target_modules=_target_modules(_named_modules(model, generation, lora), pattern, adapted, whole),
        modules_to_save=whole,
        layer_replication=_replicated(model, lora) or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )


def _modules_to_save(
    model: nn.Module, generation: Generation, arguments: Arguments, adapted: Sequence[str]
) -> list[str]:
    """The full names of the modules that are trained whole beside the adapters; none is inside another.

    PEFT would wrap a module inside a wrapped one too, and could then neither save nor load the adapter.

    Args:
        model: The base model.
        generation: Its generation.
        arguments: The flags.
        adapted: The layers for which adapters are asked.

    Raises:
        UserError: Flags ask for both in the same place, or name a module that cannot be trained.
    """
    named = [part.strip() for part in arguments.lora.lora_modules_to_save.split(",") if part.strip()]
    # In float32 with Adam's averages the embeddings of a model of 8 billion parameters would need 9 GB beside 4 bits.
    usual = [generation.merger] if arguments.lora.q_lora else [generation.embed_tokens, generation.merger]
    unasked = [] if "none" in named else usual
    trains_tower = _trains_tower_whole(generation, arguments, adapted)
    find = partial(_find_modules, model, generation, arguments.training, trains_tower)
    asked = {
        "--tune_vision true": [generation.vision_tower] if trains_tower else [],
        "--lora_modules_to_save": [module for name in named if name != "none" for module in find(name)],
    }
    for flag, modules in asked.items():
        _refuse_both(generation, arguments.lora, adapted, flag, modules)
    # Who asks for adapters on a part that no flag names wants them instead.
    whole = [module for module in unasked if not any(_is_inside(layer, module) for layer in adapted)]
    whole = list(dict.fromkeys([*whole, *(module for modules in asked.values() for module in modules)]))
    return [name for name in whole if not any(_is_inside(name, other) for other in whole)]


def _trains_tower_whole(generation: Generation, arguments: Arguments, adapted: Sequence[str]) -> bool:
    """Whether the vision tower is trained whole: adapters on it replace the published default, but not a given flag."""
    has_adapters = any(_is_inside(layer, generation.vision_tower) for layer in adapted)
    return arguments.training.tune_vision and ("tune_vision" in arguments.given or not has_adapters)


def _refuse_both(
    generation: Generation, lora: LoraArguments, adapted: Sequence[str], flag: str, modules: Sequence[str]
) -> None:
    """Refuse adapters inside modules that a flag trains whole; the default expression leaves such layers out instead.

    Raises:
        UserError: Both are asked for.
    """
    for layer, module in (
        (layer, module) for module in modules for layer in adapted if _is_inside(f"{layer}.", module)
    ):
        for part, place in adapted_parts(generation, lora).items():
            if _is_inside(layer, place):
                raise UserError(f"--lora_targets {part}: {flag} trains {module} whole; leave it out of one of the two.")
        if lora.lora_target_modules != PUBLISHED_LORA_TARGETS:
            raise UserError(trained_twice(lora.lora_target_modules, layer, module, flag))


def adapted_parts(generation: Generation, lora: LoraArguments) -> dict[str, str]:
    """The modules whose linear layers `--lora_targets` names, without the language model, by the names of the parts."""
    modules = {"resampler": generation.merger, "vision": generation.vision_tower}
    named = target_parts(lora.lora_targets)
    return {part: module for part, module in modules.items() if part in named}


def _find_modules(
    model: nn.Module, generation: Generation, training: TrainingArguments, trains_tower: bool, wanted: str
) -> list[str]:
    """The full names of the modules that `--lora_modules_to_save` calls by a full name or by its end."""
    flag = f"--lora_modules_to_save {wanted}"
    found = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{wanted}")}
    if not found:
        raise UserError(f"{flag}: the model has no such module; correct the name.")
    in_tower = [name for name in found if _is_inside(f"{name}.", generation.vision_tower)]
    if not trains_tower and len(in_tower) == len(found):
        reason = "which --tune_vision false freezes" if not training.tune_vision else "which has adapters"
        raise UserError(f"{flag}: lies in the vision tower, {reason}; leave one of the two out.")
    usable = []
    for name in (name for name in found if name not in in_tower):
        # A list is not called itself, so PEFT cannot wrap it.
        module = found[name]
        is_list = isinstance(module, nn.ModuleList)
        parts = {f"{name}.{number}": part for number, part in enumerate(module)} if is_list else {name: module}
        usable += [part for part in parts if any(True for _ in parts[part].parameters())]
    if not usable and not in_tower:
        raise UserError(f"{flag}: has no parameters that could be trained; leave it out.")
    return usable


def _is_inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _adapted_layers(model: PreTrainedModel, generation: Generation, lora: LoraArguments) -> tuple[str, list[str]]:
    """The expression with this generation's module names, and the layers for which the flags ask for adapters."""
    pattern, matched = _match_targets(model, generation, lora)
    targets, parts = target_parts(lora.lora_targets), adapted_parts(generation, lora).values()
    chosen = matched if not targets or "llm" in targets else []
    if chosen and lora.lora_layers_to_transform is not None:
        chosen = _select_layers(chosen, lora)
    linear = _linear_layers(model, generation, lora)
    of_parts = [name for name in linear if any(_is_inside(name, part) for part in parts)]
    return pattern, list(dict.fromkeys([*chosen, *of_parts]))


def _target_modules(
    modules: Iterable[tuple[str, nn.Module]], pattern: str, adapted: Sequence[str], whole: Sequence[str]
) -> str | list[str]:
    """A regular expression of module names; the names themselves if it matches more than the layers that are adapted.

    PEFT refuses an expression that also matches modules that are not linear, and one together with a choice of layers.
    """
    left = [name for name in adapted if not any(_is_inside(f"{name}.", other) for other in whole)]
    if not left:
        raise UserError(
            f"--lora_target_modules {pattern!r}: matches only layers that are trained whole, such as {adapted[0]}; "
            "choose other layers, or leave these out of --lora_modules_to_save."
        )
    everything = [name for name, _ in modules if re.fullmatch(pattern, name)]
    return pattern if everything == left else left


def _linear_layers(model: PreTrainedModel, generation: Generation, lora: LoraArguments) -> list[str]:
    """The names of the linear layers that the model will compute with."""
    unused = generation.unused_modules(model.config.to_dict())
    linear = (name for name, module in _named_modules(model, generation, lora) if isinstance(module, nn.Linear))
    return [name for name in linear if not any(_is_inside(name, module) for module in unused)]


def _named_modules(
    model: PreTrainedModel, generation: Generation, lora: LoraArguments
) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names by which PEFT finds them, which is after it has replicated layers."""
    ranges = _replicated(model, lora)
    for name, module in model.named_modules():
        for renamed in stacked_names(name, ranges, generation):
            yield renamed, module


def _replicated(model: PreTrainedModel, lora: LoraArguments) -> list[tuple[int, int]]:
    return layer_ranges(lora.lora_layer_replication, model.config.get_text_config().num_hidden_layers)


def _match_targets(model: PreTrainedModel, generation: Generation, lora: LoraArguments) -> tuple[str, list[str]]:
    """The expression with this generation's module names, and the linear layers that it matches."""
    pattern = lora.lora_target_modules
    layers = _linear_layers(model, generation, lora)
    matched: list[str] = []
    for candidate in generation.target_patterns(pattern):
        if not matched:
            pattern = candidate
            matched = [name for name in layers if re.fullmatch(pattern, name)]
    if not matched:
        raise UserError(
            f"--lora_target_modules {pattern!r}: matches no linear layer of MiniCPM-V {generation.version}, whose "
            f"language model's layers are named {generation.language_model}.layers.N.…"
        )
    return pattern, matched


def _select_layers(names: list[str], lora: LoraArguments) -> list[str]:
    """Those of the target modules that are in the layers of `lora_layers_to_transform`."""
    wanted = {int(number) for number in str(lora.lora_layers_to_transform).split(",")}
    counter = re.compile(rf"\.{re.escape(lora.lora_layers_pattern or 'layers')}\.(\d+)\.")
    numbered = {name: int(found.group(1)) for name in names if (found := counter.search(name))}
    if lora.lora_layers_pattern and not numbered:
        raise UserError(
            f"--lora_layers_pattern {lora.lora_layers_pattern}: no target's name has a number behind this word; leave "
            "the flag out."
        )
    if not wanted <= set(numbered.values()):
        raise UserError(
            f"--lora_layers_to_transform: layers {sorted(wanted - set(numbered.values()))} contain no target; choose "
            f"from {sorted(set(numbered.values()))}."
        )
    return [name for name, number in numbered.items() if number in wanted]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters, correctly also if ZeRO-3 keeps only a part of each parameter in this process.

    Returns:
        Number of trainable parameters; and of all, adapters included, and what is trained whole beside them once: PEFT
        keeps its frozen original too, which computes nothing.
    """
    trainable = total = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        size = parameter_size(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of a parameter's values, also if this process has only a part of them."""
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    # bitsandbytes stores two weights in a byte.
    return size * 2 if type(parameter).__name__ == "Params4bit" else size
