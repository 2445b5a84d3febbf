"""What of the model is trained: full weights, adapters, and modules trained whole beside the adapters."""

import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import ADAPTER_CONFIG, update_layer_types
from minicpmv_finetune.minicpmv.generations import PUBLISHED_LORA_TARGETS, Generation

from .arguments import Arguments, LoraArguments

_LANGUAGE_MODEL_PREFIX = re.compile(r"^(\^?)llm\\\.")


def make_trainable(model: PreTrainedModel, generation: Generation, arguments: Arguments) -> PreTrainedModel | PeftModel:
    """Freeze what is not tuned, and put adapters on the language model when asked.

    Args:
        model: the loaded base model.
        generation: its description.
        arguments: `tune_vision`, `tune_llm`, `use_lora` and every `lora_*` take effect here.

    Returns:
        The model itself, or PEFT's wrapper around it.

    Raises:
        UserError: the arguments contradict the model.
    """
    training, lora = arguments.training, arguments.lora
    if training.llm_type not in {None, generation.llm_type, *generation.older_llm_types}:
        raise UserError(
            f"--llm_type {training.llm_type} contradicts the checkpoint: MiniCPM-V {generation.version} speaks "
            f"{generation.llm_type}; leave the flag out or correct it."
        )
    if not training.tune_vision:
        model.get_submodule(generation.vision_tower).requires_grad_(False)
    if not training.tune_llm:
        model.get_submodule(generation.language_model).requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if not training.use_lora:
        return model
    if lora.lora_weight_path:
        source = lora.lora_weight_path
        adapter = storage.fetch(source) if storage.is_object_uri(source) else Path(source)
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise UserError(f"--lora_weight_path {adapter}: no {ADAPTER_CONFIG} here; give an adapter folder.")
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        update_layer_types(model)
        return adapted
    with warnings.catch_warnings():
        # PEFT asks for it by the name it had before.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, lora_config(model, generation, arguments))
    update_layer_types(model)
    if not training.tune_vision:
        # lora_bias "all" would train the biases of the vision tower too.
        model.get_submodule(generation.vision_tower).requires_grad_(False)
    return adapted


def lora_config(model: PreTrainedModel, generation: Generation, arguments: Arguments) -> LoraConfig:
    """The PEFT configuration that the `lora_*` arguments describe, with this generation's module names."""
    lora = arguments.lora
    if lora.lora_bias not in {"none", "all", "lora_only"}:
        raise UserError(f"--lora_bias {lora.lora_bias}: must be none, all or lora_only.")
    asked = [part.strip() for part in lora.lora_modules_to_save.split(",") if part.strip()]
    whole = [generation.embed_tokens, generation.merger]
    if asked == ["none"]:
        asked, whole = [], []
    if arguments.training.tune_vision:
        whole.append(generation.vision_tower)
    names = {name for name, _ in model.named_modules()}
    for name in asked:
        if not any(known == name or known.endswith(f".{name}") for known in names):
            raise UserError(f"--lora_modules_to_save {name}: the model has no such module.")
        whole.append(name)
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.lora_bias,  # type: ignore[arg-type]
        target_modules=_targets(model, generation, lora),
        modules_to_save=whole,
        layer_replication=_replication(model, generation, lora.lora_layer_replication),
        task_type="CAUSAL_LM",
    )


def _targets(model: nn.Module, generation: Generation, lora: LoraArguments) -> str | list[str]:
    """A regular expression, or the names it means when only some layers are wanted (PEFT takes no both)."""
    pattern = lora.lora_target_modules
    if pattern == PUBLISHED_LORA_TARGETS:
        pattern = generation.lora_target_modules
    prefix = re.escape(generation.language_model).replace("\\", "\\\\") + r"\\."
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched: list[str] = []
    try:
        # As it stands where the language model is called `llm`, else with the name it has.
        for candidate in (pattern, _LANGUAGE_MODEL_PREFIX.sub(rf"\1{prefix}", pattern)):
            if not matched:
                pattern = candidate
                matched = [name for name in layers if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"--lora_target_modules {pattern!r}: not a regular expression ({error}).") from error
    if not matched:
        raise UserError(
            f"--lora_target_modules {pattern!r}: matches no linear layer of MiniCPM-V {generation.version}, whose "
            f"language model's layers are named {generation.language_model}.layers.N.…"
        )
    if lora.lora_layers_to_transform is None:
        return pattern
    try:
        wanted = {int(number) for number in lora.lora_layers_to_transform.split(",")}
    except ValueError:
        raise UserError(
            f"--lora_layers_to_transform {lora.lora_layers_to_transform}: give layer numbers such as 0,1,5."
        ) from None
    counter = re.compile(rf"\.{re.escape(lora.lora_layers_pattern or 'layers')}\.(\d+)\.")
    numbered = {name: int(found.group(1)) for name in matched if (found := counter.search(name))}
    if not wanted <= set(numbered.values()):
        raise UserError(
            f"--lora_layers_to_transform: layers {sorted(wanted - set(numbered.values()))} hold no target; those "
            f"with one are {sorted(set(numbered.values()))}."
        )
    return [name for name, number in numbered.items() if number in wanted]


def _replication(model: PreTrainedModel, generation: Generation, ranges: str | None) -> list[tuple[int, int]] | None:
    """The ranges of the language model's layers to stack, from `0:4,2:6`."""
    if not ranges:
        return None
    if not generation.interchangeable_layers:
        raise UserError(
            f"--lora_layer_replication: MiniCPM-V {generation.version} mixes linear and full attention in a fixed "
            "order, which replicated layers would break; leave the flag out."
        )
    count = model.config.get_text_config().num_hidden_layers
    pairs = [re.fullmatch(r"\s*(\d+):(\d+)\s*", part) for part in ranges.split(",")]
    stacked = [(int(pair[1]), int(pair[2])) for pair in pairs if pair]
    if len(stacked) != len(pairs) or not all(start < end <= count for start, end in stacked):
        raise UserError(
            f"--lora_layer_replication {ranges}: give ranges of the {count} layers, first and one past the last, such "
            f"as 0:{count},{count // 2}:{count}."
        )
    return stacked


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters, right also where ZeRO-3 keeps only a part of each here."""
    trainable = total = 0
    for parameter in model.parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        if type(parameter).__name__ == "Params4bit":
            size *= 2  # bitsandbytes keeps two in a byte
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
