"""Memory, FLOPs and padding of a training, estimated from the checkpoint's headers and the data's lengths alone.

docs/performance.md states every formula; none needs a GPU. Memory is that of one device, without fragmentation of the
allocator.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.generations import Generation, count_experts, generation_of, read_json
from minicpmv_finetune.shards.packing import pack_samples

from .layers import PUBLISHED_TARGETS, Targets, layer_ranges, linear_layer, part_of, stacked_layers, stacked_names

# Bytes per unit.
_BF16 = 2  # a number in bf16
_FLOAT32 = 4  # a gradient in a bucket of DDP
# A trained parameter: weight 4, gradient 4 and Adam 8 in float32; with DeepSpeed weight 2, gradient 2, and Adam with a
# float32 copy 12 (Rajbhandari et al. 2020, 3.1).
_TRAINED = 16
_SHARDED = 14  # the part of these that ZeRO-2 shards over devices: gradient and optimizer state
_NF4 = 4.127 / 8  # a 4-bit parameter with its doubly quantized scales (Dettmers et al. 2023, 3)
_VISION = 34  # activations per layer, patch and width (Korthikanti et al. 2022, eq. 2, without the score matrix)
# Activations of the language model per layer and token, for each unit of its width and of its feed-forward layer's:
# norms keep float32 inputs, attention its inputs, the gated feed-forward layer three results. A trained matrix also
# keeps its input. Calibrated by the measurements of docs/gpu.md.
_TEXT, _GATED = 18, 6
_TEXT_TRAINED, _GATED_TRAINED = 22, 8
_LINEAR = 30  # linear attention, per token and channel of queries, keys and values, most of it in float32
_LOGIT = 10  # a logit: bf16, its float32 copy, and the gradient of this copy
_LOGITS = 2**26  # logits at a time; `minicpmv/loss.py` computes them in chunks
_RUNTIME = 1.5e9  # the CUDA context and library workspaces, in total


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Attributes:
        devices: Number of GPUs.
        batch_size: Number of samples that a device processes at once.
        epochs: How often every sample is used.
        use_lora: Whether to train adapters on the language model.
        tune_vision: Whether to train the vision tower whole.
        tune_llm: Whether to train the language model's own weights.
        lora_r: Rank of the adapters.
        accumulation_steps: Number of batches per optimizer step.
        whole: The parts that are trained whole beside the adapters, as far as they get no adapters themselves.
        whole_in_4_bits: The same of QLoRA, which trains the embeddings only where that is asked for.
        tokens_per_batch: Largest number of tokens that a device processes at once; 0 if it counts samples.
        share_images: Whether samples with the same image share a row; `batch_size` then counts rows.
        use_dora: Whether adapters also train the length of each row of a weight.
    """

    devices: int
    batch_size: int
    epochs: float
    use_lora: bool
    tune_vision: bool
    tune_llm: bool
    lora_r: int
    accumulation_steps: int
    whole: tuple[str, ...] = ("embeddings", "merger")
    whole_in_4_bits: tuple[str, ...] = ("merger",)
    tokens_per_batch: int = 0
    share_images: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Model:
    """Numbers of parameters, and the sizes that activations depend on.

    Attributes:
        parameters: Number of parameters of `language`, `embeddings`, `head`, `vision` and `merger`.
        lora_features: Sum of the input and output features of all layers that get adapters.
        hidden_size: Width of the language model.
        layers: Number of layers of the language model, replicas included.
        vocab_size: Number of tokens in the vocabulary.
        vision_hidden_size: Width of the vision tower.
        vision_layers: Number of layers of the vision tower.
        intermediate_size: Width of the language model's feed-forward layers.
        linear_layers: Number of its layers with linear attention.
        linear_channels: Number of channels of queries, keys and values in such a layer.
        adapts_feed_forward: Whether the feed-forward layers get adapters, which keep their inputs.
        experts: Number of parameters of all experts of a mixture of experts, which are part of `language`.
        used_experts: Share of the experts that computes a token.
        vision_passes: Share of the vision tower's operations on all patches: some towers merge patches on the way.
        adapted: The parts with layers that get adapters.
        unused: Number of the vision tower's parameters that never compute anything, so that they stay frozen.
        lora_outputs: Sum of the output features of all layers that get adapters.
        language_passes: How often a token is computed by the language model's parameters, on average: more than once
            where layers are replicated.
    """

    parameters: Mapping[str, int]
    lora_features: int
    hidden_size: int
    layers: int
    vocab_size: int
    vision_hidden_size: int
    vision_layers: int
    intermediate_size: int
    linear_layers: int
    linear_channels: int
    adapts_feed_forward: bool = False
    experts: int = 0
    used_experts: float = 1.0
    vision_passes: float = 1.0
    adapted: tuple[str, ...] = ("language",)
    unused: int = 0
    lora_outputs: int = 0
    language_passes: float = 1.0

    @property
    def total(self) -> int:
        """Number of the base model's parameters."""
        return sum(self.parameters.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the files with the weights, in bf16."""
        return _BF16 * self.total

    @property
    def idle(self) -> int:
        """Number of parameters that do not compute a token: the experts that were not chosen for it."""
        return round(self.experts * (1.0 - self.used_experts))

    @property
    def active(self) -> int:
        """Number of parameters that compute a token."""
        return self.total - self.idle

    def adapters(self, recipe: Recipe) -> int:
        """Number of the adapters' parameters."""
        if not recipe.use_lora:
            return 0
        return recipe.lora_r * self.lora_features + (self.lora_outputs if recipe.use_dora else 0)

    def trained(self, recipe: Recipe) -> int:
        """Number of trained parameters: the adapters, and the modules that are trained completely."""
        parts = self.parameters
        vision = parts["vision"] - self.unused if recipe.tune_vision else 0
        if recipe.use_lora:
            whole = [part for part in recipe.whole if part not in self.adapted]
            return vision + sum(parts[part] for part in whole) + self.adapters(recipe)
        count = vision + parts["merger"]
        if recipe.tune_llm:
            return count + parts["language"] + parts["embeddings"] + parts["head"]
        return count

    def trains_in_tower(self, recipe: Recipe) -> bool:
        """Whether the backward pass runs through the vision tower."""
        return recipe.tune_vision or (recipe.use_lora and "vision" in self.adapted)


Tensor = tuple[str, Sequence[int], int]
"""Name and shape of a tensor, and how many such tensors there are in layers of other numbers."""


def read_model(checkpoint: Path, targets: Targets = PUBLISHED_TARGETS) -> Model:
    """Count a checkpoint's parameters from the headers of its safetensors files.

    Args:
        checkpoint: Folder of the checkpoint.
        targets: Which layers get adapters.

    Raises:
        UserError: There are no such files, or the configuration lacks a size.
    """
    path = checkpoint / "config.json"
    config = read_json(path)
    generation = generation_of(config, str(path))
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise UserError(f"{checkpoint}: contains no *.safetensors file; give a complete checkpoint as base model.")
    tensors: list[Tensor] = []
    for weights in files:
        with safe_open(weights, framework="numpy") as file:
            tensors += [(name, file.get_slice(name).get_shape(), 1) for name in file.keys()]  # noqa: SIM118 - no mapping
    try:
        return measure_model(generation, config, tensors, targets)
    except KeyError as error:
        raise UserError(f"{path}: lacks {error.args[0]}; give a complete checkpoint.") from error


def measure_model(
    generation: Generation, config: Mapping[str, Any], tensors: Iterable[Tensor], targets: Targets = PUBLISHED_TARGETS
) -> Model:
    """Count a model's parameters from its tensors' shapes.

    Args:
        generation: Generation of the model.
        config: Content of its config.json.
        tensors: All tensors; where layers are replicated, each by itself.
        targets: Which layers get adapters.

    Raises:
        KeyError: The configuration lacks a size.
        UserError: Layers are to be replicated that the model does not have.
    """
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    layers = int(text["num_hidden_layers"])
    ranges = layer_ranges(targets.replication, layers)
    stacked = stacked_layers(ranges or [(0, layers)])
    unused = generation.unused_modules(config)
    sizes = _count_tensors(generation, unused, ranges, tensors, targets)
    adapted, experts = sizes.adapted, sizes.experts
    linear_channels = sum(
        count * int(text.get(f"linear_num_{kind}_heads", heads)) * int(text.get(f"linear_{kind}_head_dim", 128))
        for kind, count, heads in (("key", 2, 16), ("value", 1, 32))  # the defaults of Qwen 3.5
    )
    return Model(
        parameters=sizes.parameters,
        lora_features=sum(map(sum, adapted.values())),
        hidden_size=int(text["hidden_size"]),
        layers=len(stacked),
        vocab_size=int(text["vocab_size"]),
        vision_hidden_size=int(vision["hidden_size"]),
        vision_layers=int(vision["num_hidden_layers"]),
        intermediate_size=_feed_forward_width(text),
        linear_layers=list(text.get("layer_types") or []).count("linear_attention"),
        linear_channels=linear_channels,
        adapts_feed_forward=any(".mlp." in layer and part_of(layer, generation) == "language" for layer in adapted),
        experts=experts,
        used_experts=int(text.get("num_experts_per_tok", 1)) / max(count_experts(config), 1) if experts else 1.0,
        vision_passes=1.0 if generation.fixed_tokens or unused else _vision_passes(vision),
        adapted=tuple(sorted({part_of(layer, generation) for layer in adapted})),
        unused=sizes.unused,
        lora_outputs=sum(outputs for outputs, _ in adapted.values()),
        language_passes=len(stacked) / max(len(set(stacked)), 1),
    )


@dataclass
class _Sizes:
    """What is counted of a model's tensors.

    Attributes:
        parameters: Number of parameters of each part.
        experts: Those of the experts of a mixture.
        unused: Those that never compute anything.
        adapted: Output and input features of each layer that gets an adapter.
    """

    parameters: dict[str, int]
    experts: int = 0
    unused: int = 0
    adapted: dict[str, tuple[int, int]] = field(default_factory=dict)


def _count_tensors(
    generation: Generation,
    unused_modules: Sequence[str],
    ranges: Sequence[tuple[int, int]],
    tensors: Iterable[Tensor],
    targets: Targets,
) -> _Sizes:
    sizes = _Sizes(dict.fromkeys(("language", "embeddings", "head", "vision", "merger"), 0))
    for name, shape, count in tensors:
        if not stacked_names(name, ranges, generation):
            continue  # its layer is in no range
        size = count * math.prod(shape)
        sizes.parameters[part_of(name, generation)] += size
        if name.startswith(tuple(f"{module}." for module in unused_modules)):
            sizes.unused += size
        elif ".experts." in name:  # in memory one tensor with all experts, which gets no adapter
            sizes.experts += size
        elif layer := linear_layer(name, shape):
            for copy in stacked_names(layer, ranges, generation):
                if targets.chooses(copy, generation):
                    sizes.adapted[copy] = count * shape[0], count * shape[1]
    return sizes


def _vision_passes(vision: Mapping[str, Any]) -> float:
    """The share of the tower's operations that is left where a layer's output is merged, four patches into one."""
    layers = int(vision["num_hidden_layers"])
    before = int(vision.get("insert_layer_id", 6)) + 1  # transformers' default
    return (before + (layers - before) / 4) / layers


def _feed_forward_width(text: Mapping[str, Any]) -> int:
    """Width of a feed-forward layer as a token sees it; of a mixture, that of the experts that compute the token."""
    if "moe_intermediate_size" in text:
        shared = int(text.get("shared_expert_intermediate_size") or 0)
        return int(text["moe_intermediate_size"]) * int(text.get("num_experts_per_tok", 1)) + shared
    return int(text.get("intermediate_size") or 4 * int(text["hidden_size"]))


def estimate_memory(model: Model, recipe: Recipe, tokens: int, patches: int, checkpointing: bool) -> dict[str, float]:
    """Bytes on each device for the largest batch, by strategy.

    Args:
        model: The model.
        recipe: Settings of the training.
        tokens: Number of tokens in the largest batch, including padding.
        patches: Number of patches in the batch's slices.
        checkpointing: Whether the backward pass computes activations again instead of storing them.
    """
    trained = model.trained(recipe)
    # PEFT keeps the original of a module that is trained completely beside the adapters.
    frozen = model.total - (0 if recipe.use_lora else trained)
    text_width, vision_width = tokens * model.hidden_size, patches * model.vision_hidden_size
    keeps_inputs = not recipe.use_lora or model.adapts_feed_forward
    text, gated = (_TEXT_TRAINED, _GATED_TRAINED) if keeps_inputs else (_TEXT, _GATED)
    layer = tokens * (text * model.hidden_size + gated * model.intermediate_size)
    linear = tokens * _LINEAR * model.linear_channels if model.linear_layers else 0
    vision_layers = model.vision_layers if model.trains_in_tower(recipe) else 0  # a frozen tower keeps nothing
    if checkpointing:
        layer_inputs = _BF16 * (text_width * model.layers + vision_width * vision_layers)
        activations = layer_inputs + max(layer + linear, _VISION * vision_width)
    else:
        activations = layer * model.layers + linear * model.linear_layers + _VISION * vision_width * vision_layers
    rest = activations + _LOGIT * min(tokens * model.vocab_size, _LOGITS) + _RUNTIME
    weights, devices = _BF16 * frozen, recipe.devices
    # ZeRO-3 gathers one layer at a time; the embeddings are usually the largest.
    layer_size = model.parameters["language"] * model.language_passes / max(model.layers, 1)
    gathered = _BF16 * max(model.parameters["embeddings"], layer_size)
    quantized = _NF4 * model.parameters["language"] + _BF16 * (frozen - model.parameters["language"])
    trained_in_4_bits = model.trained(replace(recipe, whole=recipe.whole_in_4_bits))
    # Experts, many matrices in one tensor, cannot be quantized yet, and training refuses it.
    may_quantize = recipe.use_lora and not model.experts
    return {
        "single GPU": weights + _TRAINED * trained + rest,
        # DDP averages gradients in separate buckets.
        "DDP": weights + (_TRAINED + _FLOAT32) * trained + rest,
        "ZeRO-2": weights + _BF16 * trained + _SHARDED * trained / devices + rest,
        "ZeRO-3": (weights + _TRAINED * trained) / devices + gathered + rest,
        **({"QLoRA": quantized + _TRAINED * trained_in_4_bits + rest} if may_quantize else {}),
    }


@dataclass(frozen=True)
class Loading:
    """How the processes of a machine load the weights into main memory, before FSDP2 divides them.

    Attributes:
        processes: Number of processes.
        converted: Bytes of a weight of another type than that of its file, bf16; 0 if the types are the same.
    """

    processes: int
    converted: int = 0


def estimate_main_memory(model: Model, recipe: Recipe, loading: Loading) -> float:
    """Bytes of main memory that the processes of a machine write until FSDP2 has divided the model.

    Weights in bf16 are pages of their file, of which all processes use the same and which Linux may read again. Each
    process itself has adapters, in float32, PEFT's copies of the modules that are trained whole, and weights of another
    type than the file's.

    Args:
        model: The model.
        recipe: Settings of the training.
        loading: How the weights are loaded.
    """
    written = float(loading.converted * model.total)
    if recipe.use_lora:
        adapters = model.adapters(recipe)
        written += max(loading.converted, _BF16) * (model.trained(recipe) - adapters) + _FLOAT32 * adapters
    return written * loading.processes


def estimate_flops(model: Model, recipe: Recipe, lengths: Sequence[int], patches: int, checkpointing: bool) -> float:
    """Floating point operations of one epoch.

    The forward pass takes two operations per parameter and token (Kaplan et al. 2020, 2.1), in a mixture of experts
    only of the experts that compute the token. The backward pass takes two for the gradients of the activations, and
    two for the gradient of each trained parameter. Attention scores are added. Checkpointing adds a forward pass. A
    frozen vision tower runs forward only.

    Args:
        model: The model.
        recipe: Settings of the training.
        lengths: Number of tokens of each sample.
        patches: Number of patches in all slices.
        checkpointing: Whether the backward pass computes activations again instead of storing them.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    sums = float(tokens.sum()), float(np.square(tokens).sum())
    return count_flops(model, recipe, *sums, patches, checkpointing)


def count_flops(
    model: Model, recipe: Recipe, tokens: float, squared_tokens: float, patches: float, checkpointing: bool
) -> float:
    """The operations of `estimate_flops` for sums: of the lengths in tokens, of their squares, and of the patches."""
    parts = model.parameters
    language = model.language_passes * (parts["language"] - model.idle)
    text = 2.0 * (language + (parts["head"] or parts["embeddings"])) * tokens
    # Half of 4 · layers · width · n², because attention is causal.
    scores = 2.0 * model.layers * model.hidden_size * squared_tokens
    vision = 2.0 * (parts["vision"] - model.unused + parts["merger"]) * patches
    share = min(1.0, model.trained(recipe) / model.active)
    again = 1.0 if checkpointing else 0.0
    of_vision = 1.0
    if model.trains_in_tower(recipe):
        of_vision = (3.0 if recipe.tune_vision else 2.0) + again
    return (text + scores) * (2.0 + share + again) + vision * of_vision


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Share of tokens that are padding when batches are drawn in random order."""
    if not lengths:
        return 0.0
    order = np.random.default_rng(0).permutation(np.asarray(lengths))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return 1.0 - int(order.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)


def packing_share(lengths: Sequence[int], capacity: int) -> float:
    """Share of tokens that are padding when samples are packed into rows of `capacity` tokens."""
    if not lengths:
        return 0.0
    return 1.0 - sum(lengths) / (capacity * len(pack_samples(lengths, capacity)))
