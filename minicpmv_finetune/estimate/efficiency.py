"""How much of a GPU's rate a training used: the operations that it needed, beside those of the datasheet.

Operations of recomputation are not counted, and padding neither (model FLOPs utilization, Chowdhery et al. 2022,
appendix B).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .cost import Model

PEAK_FLOPS: Mapping[str, float] = {
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "H800": 989.5e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX A6000": 154.8e12,
}
"""Datasheet rates of dense bf16 products in FLOP/s, by a part of the card's name."""

REFERENCE_GPU = "H100"
# Share of this rate that a step reaches, by the measurements of docs/gpu.md; without fla, linear attention is slower.
_REACHED, _REACHED_LINEAR = 0.4, 0.17
_MERGED = 16  # patches that become one token of the language model
_FORWARD, _INPUTS, _WEIGHTS = 2.0, 2.0, 2.0  # operations for a parameter: forward, and the gradient of either


@dataclass(frozen=True)
class Work:
    """What a training has processed, padding left out.

    Attributes:
        tokens: Number of tokens.
        squared_tokens: Sum of the squares of the samples' lengths in tokens.
        supervised: Number of supervised tokens, whose logits are computed.
        patches: Number of patches of all slices.
        squared_patches: Sum of the squares of the slices' sizes in patches.
        runs_tower: Whether the vision tower ran; with stored features it does not.
    """

    tokens: float
    squared_tokens: float
    supervised: float
    patches: float
    squared_patches: float
    runs_tower: bool


def peak_flops(device: str) -> float | None:
    """The datasheet's rate of a GPU by its name; None for a card that is not in the table."""
    cards = (card for card in PEAK_FLOPS if re.search(rf"\b{card}\b", device))
    return next((PEAK_FLOPS[card] for card in cards), None)


def expected_hours(model: Model, flops: float, rate: float) -> float:
    """GPU hours of a training.

    Args:
        model: The base model.
        flops: Operations of the training, those of recomputation too.
        rate: The GPU's rate by its datasheet, in FLOP/s.
    """
    return flops / (3600 * rate * (_REACHED_LINEAR if model.linear_layers else _REACHED))


def needed_flops(model: Model, trained: Mapping[str, int], work: Work) -> float:
    """The operations that a training needed.

    Args:
        model: The base model.
        trained: Number of trained parameters, adapters included, of `language`, `vision`, `merger` and `head`.
        work: What was processed.
    """
    parts = model.parameters
    head = parts["head"] or parts["embeddings"]
    language = round(model.language_passes * (parts["language"] - model.idle))
    text = _of_part(language, trained.get("language", 0), True) * work.tokens
    # Causal attention needs half of the scores; linear attention has none. Forward and the gradients of both factors.
    scores = 6.0 * (model.layers - model.linear_layers) * model.hidden_size * work.squared_tokens
    logits = _of_part(head, trained.get("head", 0), True) * work.supervised
    merger = _of_part(parts["merger"], trained.get("merger", 0), True) * work.patches / _MERGED
    vision = 0.0
    if work.runs_tower:
        is_trained = bool(trained.get("vision", 0))
        attended = 4.0 * model.vision_layers * model.vision_hidden_size * work.squared_patches
        vision = _of_part(parts["vision"] - model.unused, trained.get("vision", 0), is_trained) * work.patches
        vision = model.vision_passes * (vision + attended * (3.0 if is_trained else 1.0))
    return text + scores + logits + merger + vision


def _of_part(parameters: int, trained: int, passes_gradient: bool) -> float:
    """Operations of a part for each token or patch."""
    operations = (_FORWARD + (_INPUTS if passes_gradient else 0.0)) * parameters
    # Adapters are weights beside the part's own, which have a forward pass too.
    is_whole = trained >= parameters
    return operations + (_WEIGHTS if is_whole else _FORWARD + _INPUTS + _WEIGHTS) * trained
