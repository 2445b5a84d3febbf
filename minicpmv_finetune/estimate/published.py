"""The sizes of the published models, so that a recipe's cost is known without a checkpoint.

`published.json` has the shape of every tensor; the number of a layer stands for all layers that have this tensor.
Random weights of these sizes are what `benchmarks/gpu.py` trains.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from minicpmv_finetune.minicpmv.generations import Generation, generation_named, generation_of

from .cost import Model, measure_model
from .layers import Targets, linear_layer, part_of

_TABLE = Path(__file__).with_name("published.json")
_DEFAULT = Targets()
_EQUAL_SIZES = {"4.7": "4.6"}


def published_model(version: str, targets: Targets = _DEFAULT) -> Model:
    """The numbers of a published model that its cost depends on.

    Args:
        version: Generation, such as "4.6".
        targets: Which layers get adapters.
    """
    generation = generation_named(version)
    sizes = published_sizes(version)
    config = {"text_config": sizes["text"], "vision_config": sizes["vision"]}
    return measure_model(generation, config, [tuple(tensor) for tensor in sizes["tensors"]], targets)


def published_model_like(config: Mapping[str, Any], place: str, targets: Targets = _DEFAULT) -> Model | None:
    """The published model that has the sizes of a configuration; None if there is none.

    Args:
        config: Content of a config.json.
        place: Where it is, for messages.
        targets: Which layers get adapters.

    Raises:
        UserError: It is the configuration of another model than MiniCPM-V.
    """
    version = generation_of(config, place).version
    text, published = config.get("text_config") or config, published_sizes(version)["text"]
    is_like = all(text.get(name) == published[name] for name in ("hidden_size", "num_hidden_layers"))
    return published_model(version, targets) if is_like else None


def published_vision_layers(generation: Generation) -> list[str]:
    """The names of the linear layers in a published model's vision tower and merger, of every number."""
    layers = []
    for name, shape, count in published_sizes(generation.version)["tensors"]:
        layer = linear_layer(name, shape)
        if layer and part_of(name, generation) in ("vision", "merger"):
            layers += [layer.replace(".layers.0.", f".layers.{number}.") for number in range(count)]
    return layers


def published_sizes(version: str) -> dict[str, Any]:
    """The configurations `text` and `vision` of a published model, as far as they name sizes, and its `tensors`."""
    sizes: dict[str, Any] = _table()[_EQUAL_SIZES.get(version, version)]
    return sizes


@cache
def _table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_TABLE.read_text())
    return content
