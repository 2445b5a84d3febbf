"""`minicpmv-finetune train --print-plan`: what a training would train, freeze and save.

Only the base model's configuration is read, no weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from minicpmv_finetune import storage
from minicpmv_finetune.minicpmv.adapters import PEFT_PREFIX
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.terminal import console

from .arguments import Arguments, parse
from .initial_adapter import changes_base
from .learning_rates import LearningRates, learning_rates
from .trainable import count_parameters, make_trainable


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: Common name of the part.
        parameters: Number of the base model's parameters in this part.
        trained: Number of parameters that get gradients, adapters included.
        rates: Learning rates of what is trained; with LoRA+ that of A and that of B.
        how: "frozen", "trained", "adapters" or "trained whole beside the adapters".
    """

    name: str
    parameters: int
    trained: int
    rates: str
    how: str


def print_plan(flags: Sequence[str]) -> None:
    """Print as a table what a training with these flags would train, freeze and save.

    Raises:
        UserError: The flags contradict each other or the base model.
    """
    parts, saved = describe_training(parse(flags))
    table = Table("part", box=None)
    table.add_column("parameters", justify="right")
    table.add_column("trained", justify="right")
    table.add_column("")
    for part in parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trained:,}", part.how)
    to = console()
    to.print(table)
    rates = {part.name: part.rates for part in parts if part.rates}
    shown = set(rates.values()) if len(set(rates.values())) == 1 else [" ".join(pair) for pair in rates.items()]
    to.print(f"\nLearning rate: {'; '.join(shown)}")
    to.print(f"Saved: {saved}")


def describe_training(arguments: Arguments) -> tuple[list[Part], str]:
    """Find out what a training would train and save.

    Returns:
        The model's parts, and what will be saved.

    Raises:
        UserError: The arguments contradict each other or the base model.
    """
    cache = storage.local_path(arguments.training.cache_dir) if arguments.training.cache_dir else None
    base = storage.fetch(arguments.model.model_name_or_path, cache)
    model, generation = load_model(base, device_map="meta")
    with torch.device("meta"):
        trained = make_trainable(model, generation, arguments)
    rates = learning_rates(trained, generation, arguments)
    parts = [_describe_part(trained, name, prefix, rates) for name, prefix in _module_prefixes(generation).items()]
    if arguments.training.use_lora:
        return parts, f"a PEFT adapter of {_saved_parameters(trained, arguments):,} parameters{_kind(arguments)}"
    _, total = count_parameters(trained)
    return parts, f"a whole checkpoint of MiniCPM-V {generation.version}, {total:,} parameters"


def _saved_parameters(model: nn.Module, arguments: Arguments) -> int:
    """Number of parameters in the adapter's file."""
    saved = [
        (name, weight.numel())
        for name, weight in model.named_parameters()
        if weight.requires_grad or ".modules_to_save." in name
    ]
    times = 2 if changes_base(arguments.lora) else 1
    return sum(size * (times if ".lora_A." in name or ".lora_B." in name else 1) for name, size in saved)


def _kind(arguments: Arguments) -> str:
    """What is special about the adapters, for a person."""
    lora = arguments.lora
    kinds = ["DoRA"] if lora.use_dora else []
    kinds += ["rsLoRA"] if lora.use_rslora else []
    if changes_base(lora):
        kinds.append(f"begun as {lora.init_lora_weights}, of rank {2 * lora.lora_r} for the unchanged base model")
    return f" ({', '.join(kinds)})" if kinds else ""


def _module_prefixes(generation: Generation) -> dict[str, str]:
    return {
        "vision tower": generation.vision_tower,
        "resampler / merger": generation.merger,
        "embeddings": generation.embed_tokens,
        "language model": generation.language_model,
        "head": "lm_head",
    }


def _describe_part(model: nn.Module, name: str, prefix: str, rates: LearningRates) -> Part:
    total = trained = 0
    ways: set[str] = set()
    found: set[float] = set()
    for full_name, parameter in model.named_parameters():
        path = full_name.removeprefix(PEFT_PREFIX)
        inside = path.startswith(f"{prefix}.") or (name == "head" and f".{prefix}." in f".{path}")
        if not inside or (name == "language model" and (".embed_tokens." in path or ".lm_head." in path)):
            continue
        is_adapter = ".lora_" in path
        is_copy = ".modules_to_save." in path
        total += 0 if is_adapter or is_copy else parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
            found.add(rates.of(full_name))
            ways.add("adapters" if is_adapter else "trained whole beside the adapters" if is_copy else "trained")
    shown = ", ".join(f"{rate:g}" for rate in sorted(found))
    return Part(name, total, trained, shown, " and ".join(sorted(ways)) or "frozen")
