"""MiniCPM-V 4.6 and 4.7 are transformers' own classes; here they learn what no caller should have to know, and haste.

4.7 lays images out on a canvas of positions and asks each caller which tokens belong to images; without that it
refuses to train, and generates with plain positions without a word. The model knows its image token, so it looks.

A batch without an image skips the vision side. Where several processes train, the others then wait for its gradients
(DDP) or for its part of the weights (ZeRO-3, FSDP) forever; so a blank image is run and counted times zero. It runs
where images would, inside the model between embeddings and language model: ZeRO-3 wants the same order everywhere.

Without flash attention transformers' vision side attends in a loop over slices and, where patches merge, over windows
of four patches, a quarter of a thousand a slice; and merges in another loop over slices. Here each is one computation.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForImageTextToText
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6Model
from transformers.models.minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration as Transformers46
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import (
    MiniCPMV4_6Merger,
    MiniCPMV4_6VisionAttention,
)
from transformers.models.minicpmv4_7 import MiniCPMV4_7Config, MiniCPMV4_7Model
from transformers.models.minicpmv4_7 import MiniCPMV4_7ForConditionalGeneration as Transformers47
from transformers.utils.generic import is_flash_attention_requested

from .linear_attention import LinearAttention
from .loss import mask_that_hides, supervised_loss
from .modeling import PatchGrid
from .packed import PackedSamples, packed_samples

_SIDE = 4
"""Of the blank image in patches: the least that merges twice."""

_WINDOW = 2
"""Side of the squares of patches that are merged."""


def _window_order(target_sizes: torch.Tensor) -> torch.Tensor:
    """Indices that bring packed patches into the order of their windows, int [patches].

    Windows go row by row within each slice, and so do the patches within a window.

    Raises:
        ValueError: windows do not fill a slice.
    """
    if bool((target_sizes % _WINDOW).any()):
        raise ValueError(f"Slices of {target_sizes.tolist()} patches cannot be merged by {_WINDOW} × {_WINDOW}.")
    grid = PatchGrid.of(target_sizes)
    start = (grid.lengths.cumsum(0) - grid.lengths)[grid.slice]
    window = (grid.row // _WINDOW) * (grid.columns // _WINDOW) + grid.column // _WINDOW
    place = start + window * _WINDOW**2 + grid.row % _WINDOW * _WINDOW + grid.column % _WINDOW
    return torch.empty_like(place).index_put((place,), torch.arange(len(place), device=place.device))


class _VisionAttention(MiniCPMV4_6VisionAttention):
    """All slices, or all windows, of one size at once.

    An image's slices are of one size, the windows all are: sizes are few, and nothing is padded. (On a CPU one masked
    attention over slices padded to the longest took longer than transformers' loop.)
    """

    def forward(  # type: ignore[override]  # which promises a tensor and returns two things
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None, **options: Any
    ) -> Any:
        if is_flash_attention_requested(self.config):
            return super().forward(hidden_states, cu_seqlens, max_seqlen, **options)
        found, counts = cu_seqlens.diff().unique_consecutive(return_counts=True)
        runs = list(zip(counts.tolist(), found.tolist(), strict=True))
        patches = [number * length for number, length in runs]
        parts = [project(hidden_states[0]).split(patches) for project in (self.q_proj, self.k_proj, self.v_proj)]
        dropout = self.attention_dropout if self.training else 0.0
        mixed: dict[int, torch.Tensor] = {}
        for length in {length for _, length in runs}:
            members = [number for number, (_, its) in enumerate(runs) if its == length]
            # [number · length, width] → [number, heads, length, width / heads]
            states = [_joined([part[number] for number in members]) for part in parts]
            queries, keys, values = (
                rows.view(-1, length, self.num_heads, self.head_dim).transpose(1, 2) for rows in states
            )
            rows = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=self.scaling)
            back = rows.transpose(1, 2).reshape(states[0].shape).split([patches[number] for number in members])
            mixed |= zip(members, back, strict=True)
        return self.out_proj(_joined([mixed[number] for number in range(len(runs))])).unsqueeze(0), None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One behind the other; a single one as it is, where torch would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _windows(
    target_sizes: torch.Tensor, kwargs: dict[str, Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What transformers' `get_window_index` gives: order of the patches, ends of the windows, patches of a window."""
    order, size = _window_order(target_sizes), _WINDOW**2
    return order, torch.arange(0, len(order) + 1, size, dtype=torch.int32, device=order.device), size


class _Merger(MiniCPMV4_6Merger):
    def forward(self, hidden_states: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
        """As the class above, [1, patches, vision width] to tokens; but those of all slices in one tensor.

        DeepSpeed's ZeRO-3 takes note of each tensor a module returns, and wants as many in every step and process.
        """
        features = hidden_states[0]
        for mlp in self.mlp:
            windows = features[_window_order(target_sizes).to(features.device)]
            features = mlp(windows.view(-1, _WINDOW**2 * features.shape[-1]))
            target_sizes = target_sizes // _WINDOW
        return [features]


def _made_fast(model: Any) -> None:
    """Change the classes of a model's parts for those above, which have the same weights."""
    tower, merger = model.vision_tower, model.merger
    if tuple(merger.merge_kernel_size) == (_WINDOW, _WINDOW):
        merger.__class__ = _Merger
    attentions = [layer.self_attn for layer in tower.encoder.layers]
    if tuple(tower.vit_merger.window_kernel_size) == (_WINDOW, _WINDOW):
        # Its class stays, since strategies that part a model know it by name.
        tower.vit_merger.get_window_index = _windows
        attentions.append(tower.vit_merger.self_attn)
    for attention in attentions:
        attention.__class__ = _VisionAttention
    for layer in model.language_model.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn.__class__ = LinearAttention


def _encode_patches(model: Any, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
    """What the vision tower makes of all slices: the merger's input, [patches, vision width]."""
    pixels = pixel_values.to(model.vision_tower.dtype)
    merged_twice = model.config.downsample_mode != "4x"
    tower = model.vision_tower(pixels, target_sizes=target_sizes, use_vit_merger=merged_twice)
    features: torch.Tensor = tower.last_hidden_state[0]
    return features


def _merged(model: Any, features: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
    """The language model's tokens of all slices, from what `_encode_patches` made of them."""
    merged_before = _WINDOW if model.config.downsample_mode != "4x" else 1
    tokens: list[torch.Tensor] = model.merger(features.unsqueeze(0), target_sizes // merged_before)
    return tokens


def _with_features(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs, with `patch_features` merged; those of no image have their part in the embeddings."""
    features = inputs.pop("patch_features")
    if len(features):
        merged: Any = _merged(model, features, inputs["target_sizes"])
        tokens = BaseModelOutputWithPooling(pooler_output=merged)
        return inputs | {"mm_encoder_outputs": {"image": tokens}}
    size = torch.full((1, 2), _SIDE, dtype=torch.int32, device=features.device)
    merged_before = _WINDOW**2 if model.config.downsample_mode != "4x" else 1
    blank = features.new_zeros(_SIDE**2 // merged_before, features.shape[-1])
    nothing = torch.cat(_merged(model, blank, size)).sum() * 0
    embeds = _embeddings(model, inputs)
    return inputs | {"target_sizes": None, "input_ids": None, "inputs_embeds": embeds + nothing.to(embeds.dtype)}


def _embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else model.get_input_embeddings()(inputs["input_ids"])


def _forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward pass, which with `loss_only` makes no logits but those that the loss needs."""

    @wraps(plain)
    def forward(self: Any, *arguments: Any, loss_only: bool = False, **inputs: Any) -> Any:
        if not loss_only or inputs.get("labels") is None:
            return plain(self, *arguments, **inputs)
        labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        attention = self.config.text_config._attn_implementation
        inputs["attention_mask"] = mask_that_hides(inputs.get("attention_mask"), attention)
        hidden = self.model(*arguments, **inputs).last_hidden_state
        return supervised_loss(self.lm_head, hidden, labels, self.vocab_size, count)

    return forward


def _with_blank_image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs; without an image, as embeddings that the vision side had its part in."""
    saw = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs"))
    if saw or inputs.get("past_key_values") is not None or not (model.training or is_deepspeed_zero3_enabled()):
        return inputs
    embeds = _embeddings(model, inputs)
    vision, device = model.config.vision_config, embeds.device
    blank = torch.zeros(1, vision.num_channels, vision.patch_size, vision.patch_size * _SIDE**2, device=device)
    sizes = torch.full((1, 2), _SIDE, dtype=torch.int32, device=device)
    nothing = torch.cat(model.get_image_features(blank, sizes).pooler_output).sum() * 0
    return inputs | {"input_ids": None, "inputs_embeds": embeds + nothing.to(embeds.dtype)}


def _seen(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs, in which the vision side has its part, whatever it is given."""
    see = _with_blank_image if inputs.get("patch_features") is None else _with_features
    return see(model, inputs)


class _Model46(MiniCPMV4_6Model):
    def forward(self, **inputs: Any) -> Any:
        return super().forward(**_seen(self, inputs))


class _Model47(MiniCPMV4_7Model):
    def forward(self, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        samples = packed_samples(inputs)
        if samples is not None and ids is not None and inputs.get("target_sizes") is not None:
            inputs["position_ids"] = self._positions_apart(ids, inputs["target_sizes"], samples)
        elif ids is not None and inputs.get("target_sizes") is not None and inputs.get("mm_token_type_ids") is None:
            inputs["mm_token_type_ids"] = self.token_types(ids)
        told = _seen(self, inputs)
        if told is not inputs:
            # Else the shift that an earlier batch's images left would count for this one.
            self.rope_deltas = None
        return super().forward(**told)

    def _positions_apart(self, ids: torch.Tensor, target_sizes: torch.Tensor, samples: PackedSamples) -> torch.Tensor:
        """Canvas positions of a packed row, int [3, 1, tokens], each sample's as if it stood alone."""
        rows = samples.unpack(ids)
        lay_out: Any = self.get_rope_index
        positions, _ = lay_out(rows, self.token_types(rows), target_sizes, attention_mask=samples.attention_mask.long())
        return torch.stack([samples.pack(channel) for channel in positions])

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on image tokens, 0 on words."""
        return torch.as_tensor(input_ids == self.config.image_token_id).int()


class MiniCPMV4_6ForConditionalGeneration(Transformers46):  # noqa: N801 - as transformers has it, and config.json says
    """See the module."""

    def __init__(self, config: MiniCPMV4_6Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model46
        _made_fast(self.model)

    forward = _forward(Transformers46.forward)

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """What the vision tower makes of all slices: the merger's input, [patches after its own merging, width]."""
        return _encode_patches(self.model, pixel_values, target_sizes)


class MiniCPMV4_7ForConditionalGeneration(Transformers47):  # noqa: N801
    """See the module."""

    def __init__(self, config: MiniCPMV4_7Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model47
        _made_fast(self.model)

    forward = _forward(Transformers47.forward)

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """See the class above."""
        return _encode_patches(self.model, pixel_values, target_sizes)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if model_kwargs.get("mm_token_type_ids") is None and not ids.is_floating_point():
            model_kwargs = model_kwargs | {"mm_token_type_ids": self.model.token_types(ids)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


# A checkpoint of this type is loaded as the class above wherever transformers is asked to choose.
AutoModelForImageTextToText.register(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, exist_ok=True)
