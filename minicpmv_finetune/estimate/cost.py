"""What a training run takes, estimated from the checkpoint's headers and the data's lengths alone.

Every formula here is an estimate that docs/performance.md states; none looks at a GPU. Memory is of one device, without
what the allocator loses to fragmentation.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.generations import Generation, detect_generation

_BF16 = 2
_TRAINED = 16  # bytes of a trained parameter: weight 2, gradient 2, Adam in float32 12 (Rajbhandari et al. 2020, 3.1)
_SHARED = 14  # of these, what ZeRO-2 splits between devices: gradient and optimizer
_NF4 = 4.127 / 8  # bytes of a 4-bit parameter with its doubly quantized scales (Dettmers et al. 2023, 3)
_LAYER = 34  # bytes of activations a layer keeps per token and width (Korthikanti et al. 2022, eq. 2, no score matrix)
_LOGIT = 10  # bytes of a logit: bf16, its float32 copy and that one's gradient
_RUNTIME = 1.5e9  # CUDA context and library workspaces
STRATEGIES = ("single GPU", "DDP", "ZeRO-2", "ZeRO-3", "QLoRA")


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        devices: number of GPUs.
        batch: samples a device sees at once.
        epochs: how often every sample is seen.
        use_lora: adapters on the language model.
        tune_vision: train the vision tower.
        tune_llm: train the language model's own weights.
        lora_r: rank of the adapters.
        accumulation: batches of a step.
    """

    devices: int = 1
    batch: int = 4
    epochs: float = 3.0
    use_lora: bool = True
    tune_vision: bool = True
    tune_llm: bool = False
    lora_r: int = 64
    accumulation: int = 1


@dataclass(frozen=True)
class Model:
    """Numbers of parameters, and the widths that activations depend on.

    Attributes:
        parameters: of `language`, `embeddings`, `head`, `vision` and `merger`.
        lora_sides: sum of inputs and outputs of the layers that adapters are put on.
        hidden: width of the language model.
        layers: of the language model.
        vocabulary: number of tokens.
        vision_hidden: width of the vision tower.
        vision_layers: of the vision tower.
    """

    parameters: Mapping[str, int]
    lora_sides: int
    hidden: int
    layers: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    def trained(self, recipe: Recipe) -> int:
        """Parameters that are trained: the adapters, and what is trained whole beside them."""
        parts = self.parameters
        count = parts["merger"] + (parts["vision"] if recipe.tune_vision else 0)
        if recipe.use_lora:
            return count + parts["embeddings"] + recipe.lora_r * self.lora_sides
        if recipe.tune_llm:
            return count + parts["language"] + parts["embeddings"] + parts["head"]
        return count


def read_model(checkpoint: Path) -> Model:
    """Count a checkpoint's parameters from the headers of its safetensors files.

    Raises:
        UserError: there are none, or the configuration lacks a width.
    """
    generation = detect_generation(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    parameters = dict.fromkeys(("language", "embeddings", "head", "vision", "merger"), 0)
    sides = 0
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise UserError(f"{checkpoint}: no *.safetensors here; give a whole checkpoint as base model.")
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                shape = tensors.get_slice(name).get_shape()
                parameters[_part(name, generation)] += math.prod(shape)
                if len(shape) == 2 and re.fullmatch(generation.lora_target_modules, name.removesuffix(".weight")):
                    sides += sum(shape)
    try:
        return Model(
            parameters,
            sides,
            int(text["hidden_size"]),
            int(text["num_hidden_layers"]),
            int(text["vocab_size"]),
            int(vision["hidden_size"]),
            int(vision["num_hidden_layers"]),
        )
    except KeyError as error:
        raise UserError(f"{checkpoint / 'config.json'}: no {error.args[0]}; give a whole checkpoint.") from error


def memory(model: Model, recipe: Recipe, tokens: int, patches: int, checkpointing: bool) -> dict[str, float]:
    """Bytes on each device by strategy, for the largest batch.

    Args:
        model: see there.
        recipe: see there.
        tokens: of the largest batch, padding included.
        patches: of its slices.
        checkpointing: whether activations are computed again on the way back.
    """
    trained = model.trained(recipe)
    # A module trained whole beside adapters is a copy: PEFT keeps the original.
    frozen = model.total - (0 if recipe.use_lora else trained)
    kept = _BF16 * tokens * model.hidden * model.layers + _BF16 * patches * model.vision_hidden * model.vision_layers
    text_layer, vision_layer = _LAYER * tokens * model.hidden, _LAYER * patches * model.vision_hidden
    if checkpointing:
        activations = kept + max(text_layer, vision_layer)
    else:
        activations = text_layer * model.layers + vision_layer * model.vision_layers
    rest = activations + _LOGIT * tokens * model.vocabulary + _RUNTIME
    weights, devices = _BF16 * frozen, recipe.devices
    # One layer at a time is gathered; the embeddings are the largest.
    gathered = _BF16 * max(model.parameters["embeddings"], model.parameters["language"] // max(model.layers, 1))
    four_bit = _NF4 * model.parameters["language"] + _BF16 * (frozen - model.parameters["language"])
    return {
        "single GPU": weights + _TRAINED * trained + rest,
        # Buckets of gradients that are being averaged.
        "DDP": weights + (_TRAINED + _BF16) * trained + rest,
        "ZeRO-2": weights + _BF16 * trained + _SHARED * trained / devices + rest,
        "ZeRO-3": (weights + _TRAINED * trained) / devices + gathered + rest,
        **({"QLoRA": four_bit + _TRAINED * trained + rest} if recipe.use_lora else {}),
    }


def flops(model: Model, recipe: Recipe, lengths: Sequence[int], patches: int, checkpointing: bool) -> float:
    """Floating point operations of one epoch.

    Two for each parameter and token forwards (Kaplan et al. 2020, 2.1), as many backwards through the activations and
    once more for the gradient of each trained parameter; the scores of attention on top. Recomputing adds a forward.

    Args:
        model: see there.
        recipe: see there.
        lengths: tokens of each sample.
        patches: of all slices.
        checkpointing: whether activations are computed again on the way back.
    """
    parts = model.parameters
    tokens = np.asarray(lengths, dtype=np.float64)
    text = 2.0 * (parts["language"] + (parts["head"] or parts["embeddings"])) * float(tokens.sum())
    scores = 2.0 * model.layers * model.hidden * float(np.square(tokens).sum())  # causal: half of 4·layers·width·n²
    vision = 2.0 * (parts["vision"] + parts["merger"]) * patches
    share = min(1.0, model.trained(recipe) / model.total)
    return (text + scores + vision) * (2.0 + share + (1.0 if checkpointing else 0.0))


def padding_waste(lengths: Sequence[int], batch: int, seed: int = 0) -> float:
    """Share of tokens that are padding when batches are drawn in random order."""
    if not lengths:
        return 0.0
    order = np.random.default_rng(seed).permutation(np.asarray(lengths))
    padded = sum(
        int(order[start : start + batch].max()) * len(order[start : start + batch])
        for start in range(0, len(order), batch)
    )
    return 1.0 - int(order.sum()) / padded


def packing_waste(lengths: Sequence[int], size: int) -> float:
    """Share of tokens that are padding when samples are packed into rows of `size` tokens, first fit decreasing."""
    if not lengths:
        return 0.0
    return 1.0 - sum(lengths) / (size * pack(lengths, size))


def pack(lengths: Sequence[int], size: int) -> int:
    """How many rows of `size` tokens first fit decreasing needs; no length is larger than `size`.

    A binary tree over the rows tells the most room below each of its nodes, so the first row with room enough is found
    in a step a level.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [size] * (2 * leaves)
    rows = 0
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows = max(rows, node - leaves + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _part(name: str, generation: Generation) -> str:
    prefixes = {
        "embeddings": generation.embed_tokens,
        "vision": generation.vision_tower,
        "merger": generation.merger,
        "language": generation.language_model,
    }
    return next((part for part, prefix in prefixes.items() if name.startswith(f"{prefix}.")), "head")
