"""What a training would train, freeze and save, told from the base model's configuration without reading a weight."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minicpmv_finetune import storage
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import Generation

from .arguments import Arguments
from .trainable import count_parameters, make_trainable


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: as people call it.
        parameters: of the base model in this part.
        trained: parameters that get gradients, adapters included.
        how: "frozen", "trained", "adapters" or "trained whole beside the adapters".
    """

    name: str
    parameters: int
    trained: int
    how: str


def plan_training(arguments: Arguments) -> tuple[list[Part], str]:
    """The model's parts and what will be saved.

    Raises:
        UserError: the arguments contradict each other or the base model.
    """
    cache = Path(arguments.training.cache_dir) if arguments.training.cache_dir else None
    base = storage.fetch(arguments.model.model_name_or_path, cache)
    model, generation = load_model(base, device_map="meta")
    with torch.device("meta"):
        trained = make_trainable(model, generation, arguments)
    parts = [_part(trained, name, prefix) for name, prefix in _parts(generation).items()]
    if not arguments.training.use_lora:
        return (
            parts,
            f"a whole checkpoint of MiniCPM-V {generation.version}, {count_parameters(trained)[1]:,} parameters",
        )
    return parts, f"a PEFT adapter of {sum(part.trained for part in parts):,} parameters"


def _parts(generation: Generation) -> dict[str, str]:
    return {
        "vision tower": generation.vision_tower,
        "resampler / merger": generation.merger,
        "embeddings": generation.embed_tokens,
        "language model": generation.language_model,
        "head": "lm_head",
    }


def _part(model: nn.Module, name: str, prefix: str) -> Part:
    total = trained = 0
    ways: set[str] = set()
    for full, parameter in model.named_parameters():
        path = full.removeprefix("base_model.model.")
        inside = path.startswith(f"{prefix}.") or (name == "head" and f".{prefix}." in f".{path}")
        if not inside or (name == "language model" and (".embed_tokens." in path or ".lm_head." in path)):
            continue
        adapter = ".lora_" in path
        copy = ".modules_to_save." in path
        total += 0 if adapter or copy else parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
            ways.add("adapters" if adapter else "trained whole beside the adapters" if copy else "trained")
    return Part(name, total, trained, " and ".join(sorted(ways)) or "frozen")
