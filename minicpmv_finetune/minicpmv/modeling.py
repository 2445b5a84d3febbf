"""MiniCPM-V 2.6, 4.0 and 4.5: a vision tower, a resampler and a language model, in current transformers.

An image arrives as slices of different sizes, each a grid of patches. The tower encodes all slices of a batch in one
pass, the resampler converts each slice to `query_num` features of the language model's width, and the features replace
the embeddings of the placeholder token `<unk>` in the text.

Between these modules, patches are *packed*: [patches of all slices, width], one slice after the other. Only attention
needs the slices separately; there they are padded to the longest slice of the batch. All slices have about the same
area, so there is little padding (3.5 % for a batch of images from 300 × 200 to 1344 × 1344). As measured, one masked
attention over the padded batch is five to eight times as fast as a block-diagonal mask over the packed patches, and
its time is within a tenth of one attention call for each slice, which would be a loop over the slices.

Tables of positions are computed when they are needed. The published code keeps them in non-persistent buffers, which
transformers 5 leaves uninitialized when it loads a model, so that the model's results are wrong without a warning.

The names of the tensors (`llm.*`, `vpm.*`, `resampler.*`) are those of the published checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from .batch import normalize_pixels
from .configuration import IMAGE_TOKEN, RESAMPLER_HEAD_DIM, MiniCPMVConfig, find_token_id
from .generations import MINICPMV_2_6
from .layer_loops import use_loops
from .loss import SupervisedOutput, drop_redundant_mask, supervised_loss

UNTIMED = -1
"""Frame number of an image that is not part of a video."""


class PatchGrid(NamedTuple):
    """The slice and the position of each packed patch, as integer tensors on the device of the slices' sizes.

    Attributes:
        lengths: [slices], number of patches of each slice.
        slice_ids: [patches], number of the patch's slice.
        row: [patches], the patch's row within its slice, from the top.
        column: [patches], the patch's column within its slice, from the left.
        rows: [patches], number of rows of the patch's slice.
        columns: [patches], number of columns of the patch's slice.
    """

    lengths: torch.Tensor
    slice_ids: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def from_target_sizes(cls, target_sizes: torch.Tensor) -> "PatchGrid":
        """Build from the (rows, columns) of each slice in patches, int [slices, 2]."""
        sizes = target_sizes.long()
        lengths = sizes.prod(dim=1)
        slice_ids = torch.repeat_interleave(lengths)
        offset = torch.arange(len(slice_ids), device=sizes.device) - (lengths.cumsum(0) - lengths)[slice_ids]
        rows, columns = sizes[slice_ids].unbind(dim=1)
        return cls(lengths, slice_ids, offset // columns, offset % columns, rows, columns)


class VisionEmbeddings(nn.Module):
    """Embeds patches and adds a learned position, from one square table for slices of any shape (as in NaViT)."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        patch_size = int(config.patch_size)  # type: ignore[arg-type]  # an integer in every MiniCPM-V
        self.side = int(config.image_size) // patch_size  # type: ignore[arg-type]
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
        """Embed packed pixels, [1, channels, patch size, patch size * patches], to [patches, width].

        The grid is on the CPU.
        """
        pixels = normalize_pixels(pixel_values, MINICPMV_2_6.resampler, self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).squeeze(0).transpose(0, 1)
        # Rounded up to a multiple of 64, so that most batches use the same cached table.
        longest = -(-int(torch.maximum(grid.rows, grid.columns).max()) // 64) * 64
        nearest = torch.from_numpy(_nearest_position_table(self.side, longest))
        position = nearest[grid.rows, grid.row] * self.side + nearest[grid.columns, grid.column]
        # The sum has the strides of its first part. With those of `patches`, later sums are slow, and norms copy.
        return self.position_embedding(position.to(patches.device, non_blocking=True)) + patches


class VisionTower(PreTrainedModel):
    """SigLIP with the changes of Idefics2 for slices of any shape."""

    config_class = SiglipVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SiglipEncoderLayer", "VisionEmbeddings"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches this file for its attention interface, which is in the imported classes instead.
        return True

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)  # type: ignore[arg-type]  # declared for the text side too
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Encode all slices in one pass.

        Args:
            pixel_values: Packed pixels, [1, channels, patch size, patch size * patches of all slices].
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.

        Returns:
            Packed features, [patches of all slices, width].
        """
        grid = PatchGrid.from_target_sizes(target_sizes.cpu())
        patches = pixel_values.shape[-1] // self.config.patch_size
        if patches != len(grid.slice_ids):
            raise ValueError(
                f"pixel_values has {patches} patches, but target_sizes describes {len(grid.slice_ids)}; give both for "
                "the same slices."
            )
        groups = Groups.from_lengths(grid.lengths, grid.slice_ids, pixel_values.device)
        padded = groups.pad(self.embeddings(pixel_values, grid))
        mask: Any = groups.mask
        if mask is not None:
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=padded, attention_mask=mask)
        encoded = self.encoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state
        return self.post_layernorm(groups.unpad(encoded))


class ResamplerAttention(nn.Module):
    """Multi-head attention with the tensors and names of `nn.MultiheadAttention`: one projection of q, k and v.

    `nn.MultiheadAttention` itself reads `out_proj.weight` without calling `out_proj`, so ZeRO-3, FSDP and an adapter on
    `out_proj` would have no effect there. The attention is always SDPA, regardless of `attn_implementation`, because
    transformers' flash attention assumes equally many queries and keys.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // RESAMPLER_HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the attention of each group.

        Args:
            query: [queries, width], the same for every group.
            key: [groups, length, width].
            value: [groups, length, width].
            attention_mask: bool [groups, length], false on padding; None without padding.

        Returns:
            [groups, queries, width].
        """
        projections = zip(
            (query.expand(len(key), -1, -1), key, value),
            self.in_proj_weight.chunk(3),
            self.in_proj_bias.chunk(3),
            strict=True,
        )
        # [groups, length, width] → [groups, heads, length, width / heads]
        queries, keys, values = (
            F.linear(states, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states, weight, bias in projections
        )
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Converts a slice's patches, of any number, to `query_num` features of the language model's width."""

    def __init__(self, query_num: int, width: int, vision_width: int) -> None:
        super().__init__()
        self.width = width
        self.query = nn.Parameter(torch.empty(query_num, width))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = ResamplerAttention(width)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self,
        patches: torch.Tensor,
        target_sizes: torch.Tensor,
        temporal_ids: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Compute the features of each slice, or of each group of frames.

        Args:
            patches: Packed features of the vision tower, [patches of all slices, vision width].
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.
            temporal_ids: Frame numbers of each group, in the order of the slices, -1 for an image that is not part of a
                video. MiniCPM-V 4.5 joins frames of a video into groups, and each group gets `query_num` features. By
                default each slice is a group of its own and has no time.

        Returns:
            [groups, query_num, width].
        """
        target_sizes, device = target_sizes.cpu(), patches.device
        grid = PatchGrid.from_target_sizes(target_sizes)
        values = self.ln_kv(self.kv_proj(patches))
        longest = int(target_sizes.max())
        positions = sincos_table(torch.arange(longest, device=device), self.width // 2)
        # Half of the width encodes the column and half the row. Only keys have positions, values have none.
        column, row = (part.to(device, non_blocking=True) for part in (grid.column, grid.row))
        keys = values + torch.cat([positions[column], positions[row]], dim=-1).to(values.dtype)
        lengths, group = grid.lengths, grid.slice_ids
        if temporal_ids is not None:
            frames = torch.tensor([frame for frames in temporal_ids for frame in frames], device=device)
            if len(frames) != len(target_sizes):
                raise ValueError(
                    f"temporal_ids has {len(frames)} frames, but there are {len(target_sizes)} slices; give one frame "
                    "number for each slice."
                )
            times = sincos_table(frames, self.width) * (frames != UNTIMED).unsqueeze(-1)
            keys = keys + times.to(values.dtype)[grid.slice_ids.to(device)]
            sizes = torch.tensor([len(frames) for frames in temporal_ids])
            group_of_slice = torch.repeat_interleave(sizes)
            lengths = torch.zeros_like(sizes).index_add(0, group_of_slice, grid.lengths)
            group = group_of_slice[grid.slice_ids]
        groups = Groups.from_lengths(lengths, group, device)
        attended = self.attn(self.ln_q(self.query), groups.pad(keys), groups.pad(values), groups.mask)
        return self.ln_post(attended) @ self.proj


class MiniCPMVForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """MiniCPM-V 2.6 (Qwen2), 4.0 (Llama) or 4.5 (Qwen3)."""

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["SiglipEncoderLayer", "VisionEmbeddings", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches this file for its attention interface, which is in the imported classes instead.
        return True

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        folder = Path(config.name_or_path or "")
        if config.image_token_id is None and config.name_or_path and folder.is_dir():
            config.image_token_id = find_token_id(folder, IMAGE_TOKEN)
        vision = config.vision_config
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.vpm = VisionTower._from_config(vision)
        if config.drop_vision_last_layer:
            del self.vpm.encoder.layers[-1]
        self.resampler = Resampler(config.query_num, config.text_config.hidden_size, vision.hidden_size)
        use_loops(self)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.text_config.initializer_range
        if isinstance(module, Resampler):
            init.trunc_normal_(module.query, std=std)
            init.normal_(module.proj, std=module.width**-0.5)
        elif isinstance(module, ResamplerAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's input embeddings."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the language model without its head."""
        return self.llm.get_decoder()

    @property
    def model(self) -> nn.Module:
        """The language model without its head, under the name where PEFT looks for layers to replicate."""
        return self.llm.model

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None,
        target_sizes: torch.Tensor | None,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        patch_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the features of every slice, or of every group of frames.

        Args:
            pixel_values: Packed pixels, [1, channels, patch size, patch size * patches of all slices].
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.
            temporal_ids: Frame numbers of each group; see `Resampler`.
            patch_features: Result of `encode_patches`, in place of pixels.

        Returns:
            [groups, query_num, width].
        """
        if target_sizes is None:
            raise ValueError("target_sizes is missing; with images, give each slice's rows and columns in patches.")
        # Once for tower and resampler, which compute on the CPU where each patch is.
        target_sizes = target_sizes.cpu()
        if patch_features is None:
            if pixel_values is None:
                raise ValueError("pixel_values is missing; with target_sizes, give pixel_values or patch_features.")
            patch_features = self.encode_patches(pixel_values, target_sizes)
        features: torch.Tensor = self.resampler(patch_features, target_sizes, temporal_ids)
        return features

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run the vision tower on all slices; returns the resampler's input, [patches of all slices, vision width]."""
        with gradients_if_trained(self.vpm):
            patches: torch.Tensor = self.vpm(pixel_values, target_sizes)
        return patches

    def encode_images(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """Run tower and resampler on all slices; returns the language model's input, [tokens of all slices, width]."""
        return self.get_image_features(pixel_values, target_sizes).flatten(0, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        patch_features: torch.Tensor | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | SupervisedOutput:
        """Run the model.

        Args:
            input_ids: [batch, length], with `config.image_token_id` at the position of each image feature.
            attention_mask: [batch, length], 0 on padding, which receives no image features.
            pixel_values: Packed pixels of all slices of the batch, in the order of their tokens; see
                `get_image_features`.
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.
            vision_features: [groups, query_num, width], the result of `get_image_features`, or [tokens, width], that of
                `encode_images`, in place of pixels.
            temporal_ids: Frame numbers of each group; see `Resampler`.
            inputs_embeds: [batch, length, width], in place of `input_ids`, with image features already inserted.
            labels: [batch, length], not shifted, -100 at positions that are not supervised.
            position_ids: [batch, length]; by default 0, 1, 2, … in each row.
            past_key_values: Cached keys and values of earlier tokens.
            use_cache: Whether to return the cache; by default the configuration's `use_cache`.
            logits_to_keep: Number of last positions whose logits are computed, 0 for all positions; or bool [batch,
                length], the positions whose logits are computed.
            patch_features: [patches of all slices, vision width], the result of `encode_patches`, in place of pixels.
            loss_only: Whether only the loss is needed, so that no other logits are computed.
            **kwargs: Arguments of the language model and of the loss (`num_items_in_batch`, `shift_labels`).

        Raises:
            ValueError: The numbers of image tokens and of image features differ.
        """
        if inputs_embeds is None:
            images = (pixel_values, target_sizes, temporal_ids, patch_features, vision_features)
            inputs_embeds = self._embed(input_ids, attention_mask, *images, is_first=past_key_values is None)
        elif any(given is not None for given in (pixel_values, vision_features, patch_features)):
            raise ValueError(
                "inputs_embeds was given with images; give input_ids, where image tokens mark the positions."
            )
        if loss_only and labels is not None:
            return self._loss_only_forward(inputs_embeds, attention_mask, labels, position_ids, **kwargs)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _loss_only_forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SupervisedOutput:
        """Run the language model and compute the loss without logits of positions that are not supervised."""
        hidden_states = self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=drop_redundant_mask(attention_mask, self.config.text_config._attn_implementation),
            position_ids=position_ids,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        vocab_size = self.config.text_config.vocab_size
        return supervised_loss(self.get_output_embeddings(), hidden_states, labels, vocab_size, num_items_in_batch)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        target_sizes: torch.Tensor | None,
        temporal_ids: Sequence[Sequence[int]] | None,
        patch_features: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        is_first: bool,
    ) -> torch.Tensor:
        """Embed the tokens and insert the image features.

        The arguments are those of `forward`; `is_first` is false for the later tokens of a generation, without images.
        """
        inputs_embeds: torch.Tensor = self.get_input_embeddings()(input_ids)
        if patch_features is not None and not len(patch_features):
            inputs_embeds = inputs_embeds + self._zero_vision_term(patch_features).to(inputs_embeds.dtype)
        elif vision_features is None and (pixel_values is not None or patch_features is not None):
            vision_features = self.get_image_features(pixel_values, target_sizes, temporal_ids, patch_features)
        if vision_features is not None:
            return self._insert_features(vision_features, inputs_embeds, input_ids, attention_mask)
        if patch_features is None and is_first and (self.training or gathers_weights(self)):
            return inputs_embeds + self._zero_vision_term().to(inputs_embeds.dtype)
        return inputs_embeds

    def _insert_features(
        self,
        features: torch.Tensor,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Replace the embeddings of the image tokens by the image features, in their order."""
        if input_ids is None:
            raise ValueError(
                "input_ids is missing; with images, give input_ids, where image tokens mark the positions."
            )
        positions = self._image_token_mask(input_ids, attention_mask).flatten().nonzero().squeeze(1)
        features = features.flatten(0, -2)
        if len(positions) != len(features):
            raise ValueError(
                f"input_ids has {len(positions)} image tokens, but the images have {len(features)} features; give the "
                "images for which the tokens were made."
            )
        tokens = inputs_embeds.flatten(0, 1).index_copy(0, positions, features.to(inputs_embeds))
        return tokens.view(inputs_embeds.shape)

    def _image_token_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the mask of image tokens, bool [batch, length]."""
        if self.config.image_token_id is None:
            raise ValueError(
                "config.image_token_id is not set, and there is no tokenizer with <unk> in the folder of the weights; "
                "set it to the id of <unk>."
            )
        is_image = input_ids == self.config.image_token_id
        # In 4.0 the image token is also the padding token.
        if attention_mask is not None and attention_mask.dim() == 2:
            is_image = is_image & attention_mask[:, -input_ids.shape[1] :].bool()
        return is_image

    def _zero_vision_term(self, patch_features: torch.Tensor | None = None) -> torch.Tensor:
        """Return zero, computed from a blank image by all vision modules, or by the resampler alone.

        A process whose batch has no image must still use the vision parameters: DDP waits for their gradients, and
        under ZeRO-3 and FSDP all processes together gather their weights.

        Args:
            patch_features: Empty features of the vision tower. If they are given, only the resampler is used.
        """
        patch = self.config.vision_config.patch_size
        blank = torch.zeros(1, self.config.vision_config.num_channels, patch, patch, device=self.device)
        size = torch.ones(1, 2, dtype=torch.int32, device=self.device)
        if patch_features is not None:
            patch_features = patch_features.new_zeros(1, patch_features.shape[-1])
        return self.get_image_features(blank, size, patch_features=patch_features).sum() * 0

    def prepare_inputs_for_generation(  # type: ignore[override]  # each model has its own inputs
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass the images at the first step only; the cache contains them for the later tokens."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {
                "pixel_values": pixel_values,
                "target_sizes": target_sizes,
                "vision_features": vision_features,
                "temporal_ids": temporal_ids,
            }
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat each sample for its beams; image features are computed once and repeated, pixels are not."""
        pixel_values, target_sizes, temporal_ids, features = (
            model_kwargs.pop(name, None) for name in ("pixel_values", "target_sizes", "temporal_ids", "vision_features")
        )
        if expand_size > 1 and (pixel_values is not None or features is not None) and input_ids is not None:
            if features is None:
                features = self.get_image_features(pixel_values, target_sizes, temporal_ids)
            image_tokens = self._image_token_mask(input_ids, model_kwargs.get("attention_mask")).sum(dim=1)
            by_sample = features.split((image_tokens // self.config.query_num).tolist())
            features = torch.cat([sample for sample in by_sample for _ in range(expand_size)])
            pixel_values = target_sizes = temporal_ids = None
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, model_kwargs = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        given = {
            "pixel_values": pixel_values,
            "target_sizes": target_sizes,
            "temporal_ids": temporal_ids,
            "vision_features": features,
        }
        return input_ids, model_kwargs | {name: value for name, value in given.items() if value is not None}


def gathers_weights(module: nn.Module) -> bool:
    """Whether all processes together gather a module's weights when it runs, so that none may leave out a part."""
    if is_deepspeed_zero3_enabled():
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def gradients_if_trained(module: nn.Module) -> torch.set_grad_enabled:
    """A context in which nothing is recorded for the backward pass if no parameter of a module is trained.

    With gradient checkpointing the embeddings' output requires gradients in every sub-model, also in a frozen tower;
    its backward pass would be computed and thrown away.
    """
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


@dataclass(frozen=True)
class Groups:
    """How packed vectors are unpacked into one row for each group, padded to the longest group.

    Groups of one length need no padding, so no mask either: attention then uses its fastest kernels, and nothing is
    copied. The slices of an image have one size, and its overview often has another.

    Attributes:
        count: Number of groups.
        mask: bool [groups, longest], false on padding; None if all groups have one length.
        group: [total], number of each vector's group.
        offset: [total], the vector's place within its group.
    """

    count: int
    mask: torch.Tensor | None
    group: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def from_lengths(cls, lengths: torch.Tensor, group: torch.Tensor, device: torch.device) -> "Groups":
        """Compute on the CPU, where the lengths are known without waiting for a GPU.

        Args:
            lengths: [groups], number of vectors of each group, on the CPU.
            group: [total], number of each vector's group, on the CPU.
            device: Device of the vectors.
        """
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        if bool(mask.all()):
            return cls(len(lengths), None, group, group)
        offset = torch.arange(len(group)) - (lengths.cumsum(0) - lengths)[group]
        return cls(len(lengths), *(part.to(device, non_blocking=True) for part in (mask, group, offset)))

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """From [total, width] to [groups, longest, width], with zeros as padding."""
        if self.mask is None:
            return packed.unflatten(0, (self.count, -1))
        padded = packed.new_zeros(*self.mask.shape, packed.shape[-1])
        return padded.index_put((self.group, self.offset), packed)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """From [groups, longest, width] to [total, width]."""
        if self.mask is None:
            return padded.flatten(0, 1)
        return padded[self.group, self.offset]


def sincos_table(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Compute sines and then cosines of positions, float32 [positions, width], as in "Attention is all you need".

    The frequencies are float32 powers, as the published code computes them: at frame 70,000 of a video, their last bit
    changes the result by several thousandths.
    """
    frequencies = torch.from_numpy(_frequencies(width)).to(positions.device, non_blocking=True)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache
def _frequencies(width: int) -> NDArray[np.float32]:
    exponents = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2.0)
    # On some machines numpy's float32 power is not rounded correctly, so the power is computed in float64.
    powers = np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)
    frequencies: NDArray[np.float32] = np.float32(1.0) / powers
    return frequencies


@lru_cache
def _nearest_position_table(side: int, longest: int) -> NDArray[np.int64]:
    """Entry [n, i] is the learned position, of `side` positions along an axis, for patch i of n patches.

    It is the number of borders k / side that are not above the fraction i / n, both in float32, as in Idefics2 and the
    published code: where a patch begins on a border, rounding decides on which side of it the patch is.
    """
    borders = (1 / side + 1 / side * np.arange(side - 1)).astype(np.float32)
    table = np.zeros((longest + 1, longest), dtype=np.int64)
    for number in range(1, longest + 1):
        table[number, :number] = np.searchsorted(borders, _patch_fractions(number), side="right")
    return table


def _patch_fractions(number: int) -> NDArray[np.float32]:
    """The fractions i / number of all patches along an axis, rounded as the published code rounds them.

    The published code computes `torch.arange(0, 1 - 1e-6, 1 / number)` where `number` is an int32 tensor, so the step
    is a float32 number. PyTorch computes the values in pairs of blocks of eight, in which each value is the block's
    first value, rounded to float32, plus a multiple of the step; values after the last pair are multiples of the step.
    PyTorch itself is not used: on processors with AVX-512 its blocks have sixteen values, and some positions differ
    from those of the table that was recorded with the published code.
    """
    step = float(np.float32(1) / np.float32(number))
    index = np.arange(number)
    first = np.where(index < number // 16 * 16, index // 8 * 8, 0)
    block = (step * first).astype(np.float32).astype(np.float64)
    return (block + step * (index - first)).astype(np.float32)


AutoModelForImageTextToText.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration)
AutoModelForCausalLM.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration)
