"""What the inputs of a run mean for its cost: the settings that `plan` computes with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpmv_finetune.components.train.flags import (
    adapter_targets,
    as_flags,
    find_mistakes,
    pop_num_nodes,
    replace_removed_flags,
    take_processes,
)
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.estimate.cost import Loading, Recipe
from minicpmv_finetune.estimate.layers import Targets

from .table import FINETUNE_INPUTS, defaults

_STRATEGIES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "ZeRO-3"}
_PARTS = {"embed_tokens": "embeddings", "lm_head": "head", "resampler": "merger", "merger": "merger"}


@dataclass(frozen=True)
class Planned:
    """The settings of a run that its cost depends on.

    Attributes:
        recipe: Settings of the training.
        targets: Which layers get adapters.
        checkpointing: Whether activations are computed again in the backward pass.
        strategy: Name of the strategy in an estimate of memory.
        loading: How the weights are loaded into main memory, where FSDP2 divides them from there; otherwise None.
    """

    recipe: Recipe
    targets: Targets
    checkpointing: bool
    strategy: str
    loading: Loading | None


def planned(inputs: Mapping[str, Any]) -> Planned:
    """The settings in a run's inputs, which have been checked; those that are missing have their defaults.

    Raises:
        UserError: A flag names modules whose parameters are not counted.
    """
    run = {**defaults(FINETUNE_INPUTS), **inputs}
    given = dict(run["training_flags"])
    nodes = pop_num_nodes(given)
    words, processes = take_processes(as_flags(given))
    flags, _ = find_mistakes(replace_removed_flags(words, lambda sentence: None))
    run |= {name: value for name, value in flags.items() if name in run}  # as in the train step
    devices = nodes * (processes or 1)
    targets = adapter_targets(flags)
    modules = str(flags.get("lora_modules_to_save") or "")
    recipe = Recipe(
        devices=devices,
        batch_size=run["per_device_train_batch_size"],
        epochs=run["num_train_epochs"],
        use_lora=run["use_lora"],
        tune_vision=run["tune_vision"] and "vision" not in targets.parts,
        tune_llm=run["tune_llm"],
        lora_r=run["lora_r"],
        accumulation_steps=flags.get("gradient_accumulation_steps", 1),
        whole=_whole_parts(modules, bool(flags.get("q_lora"))),
        whole_in_4_bits=_whole_parts(modules, True),
        tokens_per_batch=flags.get("tokens_per_batch", 0),
        share_images=bool(flags.get("share_images")),
        use_dora=bool(flags.get("use_dora")),
    )
    plain = "DDP" if devices > 1 else "single GPU"
    strategy = "QLoRA" if flags.get("q_lora") else _STRATEGIES.get(str(flags.get("strategy")), plain)
    checkpointing = bool(flags.get("activation_checkpointing"))
    converted = 2 if flags.get("fp16") else 4 if flags.get("bf16") is False else 0
    loading = Loading(processes or 1, converted) if flags.get("strategy") == "fsdp2" else None
    return Planned(recipe, targets, checkpointing, strategy, loading)


def _whole_parts(modules_to_save: str, quantized: bool) -> tuple[str, ...]:
    """The parts that are trained whole beside the adapters, by the value of `--lora_modules_to_save`."""
    names = [name.strip() for name in modules_to_save.split(",") if name.strip()]
    usual = ["merger"] if quantized else ["embeddings", "merger"]
    parts = [] if "none" in names else usual
    for name in (name for name in names if name != "none"):
        part = _PARTS.get(name.rpartition(".")[2])
        if part is None:
            raise UserError(
                f"training_flags: lora_modules_to_save {name}: plan does not count its parameters; it knows "
                f"{', '.join(_PARTS)}."
            )
        parts.append(part)
    return tuple(dict.fromkeys(parts))
