"""MiniCPM-V 4.6 and 4.7: transformers' own classes with four additions.

Image token types. 4.7 places images on a two-dimensional canvas of positions and expects from each caller the argument
`mm_token_type_ids`, which marks the image tokens. Without it, transformers' class refuses to train, and generates with
one-dimensional positions without a warning. Here the model computes the argument itself from the id of its image token.

Batches without an image. transformers' classes then skip the vision modules. If several processes train, the other
processes wait forever for the gradients of these modules (DDP) or for a part of their weights (ZeRO-3, FSDP). Here the
model encodes a blank image and adds the result multiplied by zero. It does so inside the model, between the embeddings
and the language model, where images are encoded, because ZeRO-3 requires the same order of modules in each process.

Logits of 4.6. transformers' class ignores `logits_to_keep` and computes, at the beginning of a generation, the logits
of all tokens of a prompt: 4.8 GB in bfloat16 for 16 prompts of 1,000 tokens with 150,000 words. Here 4.6 has the
forward pass of 4.7's class, which is otherwise the same.

Speed. Without flash attention, transformers' vision tower loops over the slices in each attention layer, its merger
inside the tower loops over windows of four patches (about 256 for each slice), and the final merger loops over the
slices again. Here each loop is one computation.
"""

from collections.abc import Callable
from functools import wraps
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6Model
from transformers.models.minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration as Transformers46
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import (
    MiniCPMV4_6Merger,
    MiniCPMV4_6VisionAttention,
    MiniCPMV4_6VisionModel,
)
from transformers.models.minicpmv4_7 import MiniCPMV4_7Config, MiniCPMV4_7Model
from transformers.models.minicpmv4_7 import MiniCPMV4_7ForConditionalGeneration as Transformers47
from transformers.models.minicpmv4_7.modeling_minicpmv4_7 import MiniCPMV4_7VisionModel
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_nearest_position_ids

from .batch import normalize_pixels
from .generations import MINICPMV_4_6
from .layer_loops import use_loops
from .linear_attention import LinearAttention
from .loss import drop_redundant_mask, supervised_loss
from .modeling import PatchGrid, gathers_weights, gradients_if_trained
from .packed import PackedSamples, packed_samples

_BLANK_SIDE = 4
"""Side of the blank image in patches, the smallest that can be merged twice."""

_LENGTHS, _DEVICE = "slice_lengths", "patch_device"
"""Names by which our tower passes the slices' lengths to its layers, and the device of the patches to its merger."""

_WINDOW = 2
"""Side of the square of patches that is merged into one feature."""


def _window_order(target_sizes: torch.Tensor) -> torch.Tensor:
    """Return the indices, int [patches], that reorder packed patches by windows.

    Windows are in row order within each slice, and patches are in row order within each window.

    Args:
        target_sizes: int [slices, 2], (rows, columns) of each slice in patches; best on the CPU, because the number of
            patches must be known.

    Raises:
        ValueError: The sides of a slice are not multiples of a window's side.
    """
    if bool((target_sizes % _WINDOW).any()):
        raise ValueError(
            f"Slices of {target_sizes.tolist()} patches cannot be merged by {_WINDOW} × {_WINDOW}; the numbers of rows "
            f"and columns must be multiples of {_WINDOW}."
        )
    grid = PatchGrid.from_target_sizes(target_sizes)
    start = (grid.lengths.cumsum(0) - grid.lengths)[grid.slice_ids]
    window = (grid.row // _WINDOW) * (grid.columns // _WINDOW) + grid.column // _WINDOW
    place = start + window * _WINDOW**2 + grid.row % _WINDOW * _WINDOW + grid.column % _WINDOW
    return torch.empty_like(place).index_put((place,), torch.arange(len(place), device=place.device))


class _VisionAttention(MiniCPMV4_6VisionAttention):
    """Attention over slices or windows, with one computation for all slices of the same length.

    The slices of an image have one size and so do all windows, so there are few different lengths, and no slice is
    padded. (On a CPU, one masked attention over slices padded to the longest took longer than transformers' loop.)
    """

    def forward(  # type: ignore[override]  # the base class declares a tensor but returns a tuple
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None, **options: Any
    ) -> Any:
        if is_flash_attention_requested(self.config):
            return super().forward(hidden_states, cu_seqlens, max_seqlen, **options)
        if max_seqlen is not None:  # windows, which have one size
            lengths = [max_seqlen] * (hidden_states.shape[1] // max_seqlen)
        else:
            lengths = options.get(_LENGTHS) or cu_seqlens.diff().tolist()
        # A run is a sequence of adjacent slices of the same length.
        runs = [(len(list(run)), length) for length, run in groupby(lengths)]
        patches = [count * length for count, length in runs]
        packed = hidden_states.squeeze(0)  # a view also in the backward pass, where [0] fills zeros and copies
        projected = [project(packed).split(patches) for project in (self.q_proj, self.k_proj, self.v_proj)]
        dropout = self.attention_dropout if self.training else 0.0
        outputs: dict[int, torch.Tensor] = {}
        for length in {length for _, length in runs}:
            same_length = [number for number, (_, run_length) in enumerate(runs) if run_length == length]
            # [slices · length, width] → [slices, heads, length, width / heads]
            states = [_concatenate([part[number] for number in same_length]) for part in projected]
            queries, keys, values = (
                rows.view(-1, length, self.num_heads, self.head_dim).transpose(1, 2) for rows in states
            )
            output = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=self.scaling)
            output = output.transpose(1, 2).reshape(states[0].shape)
            outputs |= zip(same_length, output.split([patches[number] for number in same_length]), strict=True)
        return self.out_proj(_concatenate([outputs[number] for number in range(len(runs))])).unsqueeze(0), None


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors; a single one is returned itself, whereas torch would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _window_index(
    target_sizes: torch.Tensor, kwargs: dict[str, Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Replace transformers' `get_window_index`.

    Returns:
        The order of the patches, the cumulative lengths of the windows, and the number of patches in a window.
    """
    order, size = _window_order(target_sizes), _WINDOW**2
    if kwargs and _DEVICE in kwargs:
        order = order.to(kwargs[_DEVICE], non_blocking=True)
    return order, torch.arange(0, len(order) + 1, size, dtype=torch.int32, device=order.device), size


class _Merger(MiniCPMV4_6Merger):
    def forward(self, hidden_states: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Merge [1, patches, vision width] to tokens; the result is one tensor for all slices, not one for each slice.

        DeepSpeed's ZeRO-3 records each tensor that a module returns and requires the same number of tensors in every
        step and process.
        """
        features, target_sizes = hidden_states.squeeze(0), target_sizes.cpu()
        for mlp in self.mlp:
            windows = features[_window_order(target_sizes).to(features.device, non_blocking=True)]
            features = mlp(windows.view(-1, _WINDOW**2 * features.shape[-1]))
            target_sizes = target_sizes // _WINDOW
        return [features]


def _replace_classes(model: Any) -> None:
    """Change the classes of a model's modules to the faster classes of this package, which have the same weights."""
    tower, merger = model.vision_tower, model.merger
    if tuple(tower.vit_merger.window_kernel_size) == (_WINDOW, _WINDOW):
        tower.__class__ = _Tower47 if type(tower) is MiniCPMV4_7VisionModel else _Tower46
    if tuple(merger.merge_kernel_size) == (_WINDOW, _WINDOW):
        merger.__class__ = _Merger
    attentions = [layer.self_attn for layer in tower.encoder.layers]
    if tuple(tower.vit_merger.window_kernel_size) == (_WINDOW, _WINDOW):
        # The module keeps its class, because strategies that shard a model find modules by their class names.
        tower.vit_merger.get_window_index = _window_index
        attentions.append(tower.vit_merger.self_attn)
    for attention in attentions:
        attention.__class__ = _VisionAttention
    for layer in model.language_model.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn.__class__ = LinearAttention
    use_loops(model)


class _Tower:
    """Replaces the forward pass of transformers' vision tower: where each patch is, is computed once, on the CPU.

    transformers' class computes it on the device of the patches, slice by slice and in each layer, and the program
    waits for a GPU each time.
    """

    def forward(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor, use_vit_merger: bool = True, **options: Any
    ) -> Any:
        tower: Any = self
        if is_flash_attention_requested(tower.config):
            original: Any = super().forward  # type: ignore[misc]  # of transformers' tower
            return original(pixel_values, target_sizes=target_sizes, use_vit_merger=use_vit_merger, **options)
        sizes, device = target_sizes.cpu(), pixel_values.device
        positions = get_vision_nearest_position_ids(sizes, tower.embeddings.num_patches_per_side)
        positions = positions.to(device, non_blocking=True)
        # A convolution's output has its channels first. Sums would inherit its strides and be slow, and norms copy.
        states = tower.embeddings(pixel_values, target_sizes=sizes, position_ids=positions).contiguous()
        lengths = sizes.prod(1).tolist()
        for number, layer in enumerate(tower.encoder.layers):
            states = layer(states, None, cu_seqlens=None, max_seqlen=None, **{_LENGTHS: lengths})
            if use_vit_merger and number == tower.config.insert_layer_id:
                states = tower.vit_merger(states, sizes, **{_DEVICE: device})
                lengths = [length // _WINDOW**2 for length in lengths]
        return BaseModelOutputWithPooling(last_hidden_state=tower.post_layernorm(states))


class _Tower46(_Tower, MiniCPMV4_6VisionModel):
    pass


class _Tower47(_Tower, MiniCPMV4_7VisionModel):
    pass


def _run_tower(model: Any, pixel_values: torch.Tensor, target_sizes: torch.Tensor, merged_twice: bool) -> Any:
    """Run the vision tower on all slices; returns its output, whose last state is [1, patches, vision width]."""
    pixels = normalize_pixels(pixel_values, MINICPMV_4_6.resampler, model.vision_tower.dtype)
    with gradients_if_trained(model.vision_tower):
        return model.vision_tower(pixels, target_sizes=target_sizes, use_vit_merger=merged_twice)


def _encode_patches(model: Any, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
    """Run the vision tower on all slices; returns the merger's input, [patches, vision width]."""
    tower = _run_tower(model, pixel_values, target_sizes, model.config.downsample_mode != "4x")
    features: torch.Tensor = tower.last_hidden_state.squeeze(0)
    return features


def _encode_images(model: Any, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
    """Run tower and merger on all slices; returns the language model's input, [tokens of all slices, width]."""
    tokens: torch.Tensor = torch.cat(model.get_image_features(pixel_values, target_sizes).pooler_output)
    return tokens


def _merge_patches(model: Any, features: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
    """Merge the result of `_encode_patches` to the language model's tokens of all slices."""
    merged_before = _WINDOW if model.config.downsample_mode != "4x" else 1
    tokens: list[torch.Tensor] = model.merger(features.unsqueeze(0), target_sizes // merged_before)
    return tokens


def _add_loss_only(plain_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Extend a forward pass by the argument `loss_only`: whether only the logits that the loss needs are computed."""

    @wraps(plain_forward)
    def forward(self: Any, *arguments: Any, loss_only: bool = False, **inputs: Any) -> Any:
        if not loss_only or inputs.get("labels") is None:
            return plain_forward(self, *arguments, **inputs)
        labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        attention = self.config.text_config._attn_implementation
        inputs["attention_mask"] = drop_redundant_mask(inputs.get("attention_mask"), attention)
        hidden_states = self.model(*arguments, **inputs).last_hidden_state
        return supervised_loss(self.lm_head, hidden_states, labels, self.vocab_size, count)

    return forward


def _use_vision_modules(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with which the model uses its vision modules, with or without an image in the batch."""
    if inputs.get("vision_features") is not None:
        return _with_tokens(inputs)
    if inputs.get("patch_features") is not None:
        return _merge_patch_features(model, inputs)
    has_image = any(
        inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
    )
    if has_image or inputs.get("past_key_values") is not None or not (model.training or gathers_weights(model)):
        return inputs
    return _add_blank_image(model, inputs)


def _with_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with `vision_features`, the result of `encode_images`, as what the vision modules would return."""
    features = inputs.pop("vision_features")
    if not len(features):
        return inputs | {"target_sizes": None}
    merged: Any = [features]
    tokens = BaseModelOutputWithPooling(pooler_output=merged)
    return inputs | {"mm_encoder_outputs": {"image": tokens}}


def _merge_patch_features(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with `patch_features` merged to tokens; empty features add zero to the embeddings."""
    features = inputs.pop("patch_features")
    if len(features):
        merged: Any = _merge_patches(model, features, inputs["target_sizes"])
        tokens = BaseModelOutputWithPooling(pooler_output=merged)
        return inputs | {"mm_encoder_outputs": {"image": tokens}}
    size = torch.full((1, 2), _BLANK_SIDE, dtype=torch.int32, device=features.device)
    merged_before = _WINDOW**2 if model.config.downsample_mode != "4x" else 1
    blank = features.new_zeros(_BLANK_SIDE**2 // merged_before, features.shape[-1])
    zero = torch.cat(_merge_patches(model, blank, size)).sum() * 0
    embeds = _embed_tokens(model, inputs)
    return inputs | {"target_sizes": None, "input_ids": None, "inputs_embeds": embeds + zero.to(embeds.dtype)}


def _add_blank_image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with embeddings to which zero, computed from a blank image, was added."""
    embeds = _embed_tokens(model, inputs)
    vision, device = model.config.vision_config, embeds.device
    blank = torch.zeros(1, vision.num_channels, vision.patch_size, vision.patch_size * _BLANK_SIDE**2, device=device)
    sizes = torch.full((1, 2), _BLANK_SIDE, dtype=torch.int32, device=device)
    zero = torch.cat(model.get_image_features(blank, sizes).pooler_output).sum() * 0
    return inputs | {"input_ids": None, "inputs_embeds": embeds + zero.to(embeds.dtype)}


def _to_cpu(argument: Any) -> Any:
    return argument.cpu() if isinstance(argument, torch.Tensor) else argument


def _embed_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else model.get_input_embeddings()(inputs["input_ids"])


class _ImageFeatures:
    """Replaces transformers' `get_image_features`: a frozen tower records nothing for the backward pass."""

    def get_image_features(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor, downsample_mode: str | None = None, **options: Any
    ) -> BaseModelOutputWithPooling:
        model: Any = self
        merged_twice = (downsample_mode or model.config.downsample_mode) != "4x"
        target_sizes = target_sizes.cpu()  # once for tower and merger
        output: BaseModelOutputWithPooling = _run_tower(model, pixel_values, target_sizes, merged_twice)
        merged_sizes = target_sizes // _WINDOW if merged_twice else target_sizes
        output.pooler_output = model.merger(output.last_hidden_state, merged_sizes)
        return output

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        token_id: int,
    ) -> torch.Tensor:
        """Return the mask of image tokens, bool [batch, length, width].

        Raises:
            ValueError: The numbers of image tokens and of image features differ.
        """
        if input_ids is None:
            original: Any = super().get_placeholder_mask  # type: ignore[misc]  # of transformers' model
            return original(input_ids, inputs_embeds, features, token_id)
        mask = input_ids == token_id
        tokens = int(mask.sum())
        if tokens != features.shape[0]:
            raise ValueError(
                f"Multimodal features and tokens do not match, tokens: {tokens}, features: {features.shape[0]}"
            )
        return mask.unsqueeze(-1).expand_as(inputs_embeds)


class _Model46(_ImageFeatures, MiniCPMV4_6Model):
    def forward(self, *, mm_token_type_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        """Run the model; `mm_token_type_ids`, which 4.7's forward pass hands on, has no meaning here."""
        return super().forward(**_use_vision_modules(self, inputs))


class _Model47(_ImageFeatures, MiniCPMV4_7Model):
    def forward(self, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        samples = packed_samples(inputs)
        if samples is not None and ids is not None and inputs.get("target_sizes") is not None:
            inputs["position_ids"] = self._packed_positions(ids, inputs["target_sizes"], samples)
        elif ids is not None and inputs.get("target_sizes") is not None and inputs.get("mm_token_type_ids") is None:
            inputs["mm_token_type_ids"] = self.token_types(ids)
        prepared = _use_vision_modules(self, inputs)
        if prepared is not inputs:
            # Otherwise the position offset of an earlier batch with images would be applied to this one.
            self.rope_deltas = None
        return super().forward(**prepared)

    def get_rope_index(self, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """Compute the canvas positions on the CPU: transformers loops over the slices and reads numbers at each."""
        compute: Any = super().get_rope_index
        on_cpu = [_to_cpu(part) for part in (input_ids, *arguments)]
        named = {name: _to_cpu(part) for name, part in options.items()}
        return tuple(part.to(input_ids.device, non_blocking=True) for part in compute(*on_cpu, **named))

    def _packed_positions(self, ids: torch.Tensor, target_sizes: torch.Tensor, samples: PackedSamples) -> torch.Tensor:
        """Compute the canvas positions of a packed row, int [3, 1, tokens], for each sample by itself."""
        rows, mask = samples.unpack(ids), samples.attention_mask.long()
        types = self.token_types(rows)
        if samples.shared is not None:
            target_sizes = _repeat_sizes(target_sizes, types, samples.shared)
        get_rope_index: Any = self.get_rope_index
        positions, _ = get_rope_index(rows, types, target_sizes, attention_mask=mask)
        return torch.stack([samples.pack(channel) for channel in positions])

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the argument `mm_token_type_ids`: 1 on image tokens, 0 on text tokens."""
        return torch.as_tensor(input_ids == self.config.image_token_id).int()


def _repeat_sizes(target_sizes: torch.Tensor, token_types: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Repeat the sizes of slices for every sample that shares them.

    Args:
        target_sizes: int [slices, 2], without repetitions.
        token_types: int [samples, longest], 1 on image tokens; each run of them is a slice.
        shared: int [samples], 0 for the first of the samples that share their slices.
    """
    counts = (F.pad(token_types, (1, 0)).diff(dim=1) == 1).sum(1)
    firsts = torch.where(shared == 0, counts, 0).cumsum(0) - counts
    repeated = torch.repeat_interleave(firsts - (counts.cumsum(0) - counts), counts)
    return target_sizes[(repeated + torch.arange(len(repeated), device=repeated.device)).to(target_sizes.device)]


class MiniCPMV4_6ForConditionalGeneration(Transformers46):  # noqa: N801 - the name in transformers and in config.json
    """MiniCPM-V 4.6 with the additions that the module describes."""

    def __init__(self, config: MiniCPMV4_6Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model46
        _replace_classes(self.model)

    forward = _add_loss_only(Transformers47.forward)

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run the vision tower on all slices; returns the merger's input, [patches after merging, width]."""
        return _encode_patches(self.model, pixel_values, target_sizes)

    def encode_images(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run tower and merger on all slices; returns the language model's input, [tokens of all slices, width]."""
        return _encode_images(self.model, pixel_values, target_sizes)


class MiniCPMV4_7ForConditionalGeneration(Transformers47):  # noqa: N801 - the name in transformers and in config.json
    """MiniCPM-V 4.7 with the additions that the module describes."""

    def __init__(self, config: MiniCPMV4_7Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model47
        _replace_classes(self.model)

    forward = _add_loss_only(Transformers47.forward)

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run the vision tower on all slices; returns the merger's input, [patches after merging, width]."""
        return _encode_patches(self.model, pixel_values, target_sizes)

    def encode_images(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run tower and merger on all slices; returns the language model's input, [tokens of all slices, width]."""
        return _encode_images(self.model, pixel_values, target_sizes)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if model_kwargs.get("mm_token_type_ids") is None and not ids.is_floating_point():
            model_kwargs = model_kwargs | {"mm_token_type_ids": self.model.token_types(ids)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


# transformers' auto class then loads these classes for checkpoints of these types.
AutoModelForImageTextToText.register(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, exist_ok=True)
