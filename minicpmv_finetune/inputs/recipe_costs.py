"""What `plan` says of each recipe of the package, for its published base model and samples of one size."""

from collections.abc import Mapping
from dataclasses import dataclass

from minicpmv_finetune.estimate.cost import Model, Recipe, estimate_flops, estimate_memory
from minicpmv_finetune.estimate.efficiency import PEAK_FLOPS, expected_hours
from minicpmv_finetune.estimate.published import published_model

from .planned import planned
from .recipe import RECIPES, hardware_of, read_recipe
from .table import FINETUNE_INPUTS, check_inputs

SAMPLES = 10_000
TOKENS = 2048
"""Tokens of a sample for the estimate of hours, as in `benchmarks/gpu.py`; memory is that of the longest samples."""
SLICES = 10
"""Slices of a sample, of 448 x 448 pixels."""
_PATCHES = 1024  # of a slice
CARDS: Mapping[str, int] = {"L4": 24, "A100": 80, "H100": 80}
"""Memory in GB of the cards for which hours are estimated."""


@dataclass(frozen=True)
class RecipeCost:
    """A recipe and its cost.

    Attributes:
        name: Name of the recipe.
        base_model: Base model.
        trains: What is trained, and how.
        parameters: Number of trained parameters.
        devices: Number of GPUs.
        memory_gb: Memory of each GPU of the recipe, in GB.
        needed_gb: Memory that the longest samples need on each GPU, in GB.
        samples_a_step: Number of samples of an optimizer step.
        hours: Hours of a training on `SAMPLES` samples, by card that has the memory.
    """

    name: str
    base_model: str
    trains: str
    parameters: int
    devices: int
    memory_gb: int
    needed_gb: float
    samples_a_step: int
    hours: dict[str, float]


def recipe_costs() -> list[RecipeCost]:
    """The cost of every recipe of the package."""
    return [recipe_cost(name) for name in RECIPES]


def recipe_cost(name: str) -> RecipeCost:
    """The cost of a recipe of the package."""
    inputs = check_inputs(FINETUNE_INPUTS, {**read_recipe(name), "data_uri": "any"})
    settings, hardware = planned(inputs), hardware_of(name)
    recipe = settings.recipe
    model = published_model(name.partition("-")[0], settings.targets)
    tokens = recipe.batch_size * inputs["model_max_length"]
    patches = recipe.batch_size * (inputs["max_slice_nums"] + 1) * _PATCHES
    memory = estimate_memory(model, recipe, tokens, patches, settings.checkpointing)[settings.strategy]
    flops = recipe.epochs * estimate_flops(
        model, recipe, [TOKENS] * SAMPLES, SAMPLES * SLICES * _PATCHES, settings.checkpointing
    )
    return RecipeCost(
        name=name,
        base_model=inputs["base_model_uri"],
        trains=_what(recipe, settings.strategy),
        parameters=model.trained(recipe),
        devices=hardware.devices,
        memory_gb=hardware.gigabytes,
        needed_gb=round(memory / 1e9, 1),
        samples_a_step=recipe.devices * recipe.batch_size * recipe.accumulation_steps,
        hours={
            card: round(hours, 1)
            for card, hours in estimate_hours(model, recipe.devices, flops).items()
            if CARDS[card] >= hardware.gigabytes
        },
    )


def estimate_hours(model: Model, devices: int, flops: float) -> dict[str, float]:
    """Hours of a training by card.

    Args:
        model: The model.
        devices: Number of GPUs.
        flops: Floating point operations of the training.
    """
    return {card: expected_hours(model, flops, PEAK_FLOPS[card]) / devices for card in CARDS}


def _what(recipe: Recipe, strategy: str) -> str:
    if recipe.use_lora:
        kind = "QLoRA" if strategy == "QLoRA" else "LoRA"
        whole = "".join(f", {part} whole" for part in recipe.whole)
        return f"{kind} of rank {recipe.lora_r}{whole}"
    return f"all but the vision tower, {strategy}"
