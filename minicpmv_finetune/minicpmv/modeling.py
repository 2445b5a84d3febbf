"""MiniCPM-V 2.6, 4.0 and 4.5: a vision tower, a resampler and a language model, in today's transformers.

An image arrives as slices of different sizes, each a grid of patches. All slices of a batch go through the tower in
one pass, the resampler turns each into `query_num` features of the language model's width, and these take the places
that the tokenizer's `<unk>` holds for them among the embeddings of the text.

Between the parts, patches travel *packed*: [patches of all slices, width], one slice after the other. Attention alone
needs slices apart, and there they are padded to the longest of the batch: slices are all cut to about the same area, so
little of it is padding (3.5 % for images from 300 × 200 to 1344 × 1344 together). Measured, one masked attention over
the padded batch is five to eight times as fast as a block-diagonal mask over the packed whole, and within a tenth of
a call for each slice, which would be a loop over images.

Position tables are computed when they are needed. The published code keeps them in non-persistent buffers, which
transformers 5 leaves uninitialized when it loads a model, and the model is then wrong without a word.

The names of the tensors (`llm.*`, `vpm.*`, `resampler.*`) are those of the published checkpoints.
"""

from collections.abc import Sequence
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

from .configuration import IMAGE_TOKEN, RESAMPLER_HEAD_DIM, MiniCPMVConfig, find_token_id
from .loss import SupervisedOutput, mask_that_hides, supervised_loss

UNTIMED = -1
"""Frame number of an image that belongs to no video."""


class PatchGrid(NamedTuple):
    """Where each packed patch belongs; integer tensors on the patches' device.

    Attributes:
        lengths: [slices], patches of each slice.
        slice: [patches], number of its slice.
        row: [patches], counted from the slice's top.
        column: [patches], counted from the slice's left.
        rows: [patches], of its slice.
        columns: [patches], of its slice.
    """

    lengths: torch.Tensor
    slice: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, target_sizes: torch.Tensor) -> "PatchGrid":
        """From the slices' (rows, columns) in patches, [slices, 2]."""
        sizes = target_sizes.long()
        lengths = sizes.prod(dim=1)
        number = torch.repeat_interleave(lengths)
        offset = torch.arange(len(number), device=sizes.device) - (lengths.cumsum(0) - lengths)[number]
        rows, columns = sizes[number].unbind(dim=1)
        return cls(lengths, number, offset // columns, offset % columns, rows, columns)


class VisionEmbeddings(nn.Module):
    """Patches to vectors, with a learnt position from a square table whatever the slice's shape (NaViT)."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        patch_size = int(config.patch_size)  # type: ignore[arg-type]  # one number in every MiniCPM-V
        self.side = int(config.image_size) // patch_size  # type: ignore[arg-type]
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
        """Embed packed pixels [1, channels, patch, patch * patches]; returns [patches, width]."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))[0, :, 0].transpose(0, 1)
        # Rounded up, so that batches share a table.
        longest = -(-int(torch.maximum(grid.rows, grid.columns).max()) // 64) * 64
        nearest = torch.from_numpy(_nearest_positions(self.side, longest)).to(patches.device)
        position = nearest[grid.rows, grid.row] * self.side + nearest[grid.columns, grid.column]
        return patches + self.position_embedding(position)


class VisionTower(PreTrainedModel):
    """SigLIP, as Idefics2 changed it for slices of any shape."""

    config_class = SiglipVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SiglipEncoderLayer", "VisionEmbeddings"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its attention interface in this file; it is in the classes used here.
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
            pixel_values: packed, [1, channels, patch, patch * patches of all slices].
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.

        Returns:
            [patches of all slices, width], packed.
        """
        grid = PatchGrid.of(target_sizes)
        patches = pixel_values.shape[-1] // self.config.patch_size
        if patches != len(grid.slice):
            raise ValueError(f"pixel_values hold {patches} patches, but target_sizes ask for {len(grid.slice)}.")
        padded, present = pad(self.embeddings(pixel_values, grid), grid.lengths, grid.slice)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=padded, attention_mask=present)
        encoded = self.encoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state
        return self.post_layernorm(encoded[present])


class ResamplerAttention(nn.Module):
    """Multi-head attention with queries, keys and values projected by one stacked matrix, as torch names it.

    Not `nn.MultiheadAttention` itself: that reads `out_proj.weight` without calling `out_proj`, which neither ZeRO-3
    nor FSDP nor an adapter on `out_proj` notices. Attention is SDPA whatever `attn_implementation` says, since
    transformers' flash path assumes as many queries as keys.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // RESAMPLER_HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [queries, width], the same for every group.
            key: [groups, length, width].
            value: of the same shape.
            present: bool [groups, length], false on padding.

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
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=present[:, None, None, :])
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """From a slice's patches, however many, to `query_num` features of the language model's width."""

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
        """Summarise each slice, or each group of frames.

        Args:
            patches: [patches of all slices, vision width], packed.
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.
            temporal_ids: MiniCPM-V 4.5 joins the frames of a video into groups, each of which becomes one block of
                features: the frame numbers of each group, in the order of the slices, -1 for an image without a time.
                By default each slice is a group of its own and has no time.

        Returns:
            [groups, query_num, width].
        """
        grid = PatchGrid.of(target_sizes)
        values = self.ln_kv(self.kv_proj(patches))
        longest = int(target_sizes.max())
        places = sincos_table(torch.arange(longest, device=patches.device), self.width // 2)
        # Half of the width tells the column and half the row; only keys know their place.
        keys = values + torch.cat([places[grid.column], places[grid.row]], dim=-1).to(values.dtype)
        lengths, group = grid.lengths, grid.slice
        if temporal_ids is not None:
            frames = torch.tensor([frame for frames in temporal_ids for frame in frames], device=patches.device)
            if len(frames) != len(target_sizes):
                raise ValueError(f"temporal_ids name {len(frames)} frames, but there are {len(target_sizes)} slices.")
            times = sincos_table(frames, self.width) * (frames != UNTIMED).unsqueeze(-1)
            keys = keys + times.to(values.dtype)[grid.slice]
            sizes = torch.tensor([len(frames) for frames in temporal_ids], device=patches.device)
            group_of_slice = torch.repeat_interleave(sizes)
            lengths = torch.zeros_like(sizes).index_add(0, group_of_slice, grid.lengths)
            group = group_of_slice[grid.slice]
        key, present = pad(keys, lengths, group)
        value, _ = pad(values, lengths, group)
        attended = self.attn(self.ln_q(self.query), key, value, present)
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
        # transformers looks for its attention interface in this file; it is in the classes used here.
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
        """The language model's."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.llm.get_decoder()

    @property
    def model(self) -> nn.Module:
        """The same; PEFT looks for layers to replicate under this name."""
        return self.llm.model

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None,
        target_sizes: torch.Tensor | None,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        patch_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The features of every slice, or of every group of frames.

        Args:
            pixel_values: packed, [1, channels, patch, patch * patches of all slices].
            target_sizes: int [slices, 2], (rows, columns) of each slice in patches.
            temporal_ids: see `Resampler`.
            patch_features: what `encode_patches` returned, instead of pixels.

        Returns:
            [groups, query_num, width].
        """
        if target_sizes is None:
            raise ValueError("Images need target_sizes, each slice's rows and columns in patches.")
        if patch_features is None:
            if pixel_values is None:
                raise ValueError("Images need pixel_values, or patch_features instead.")
            patch_features = self.encode_patches(pixel_values, target_sizes)
        features: torch.Tensor = self.resampler(patch_features, target_sizes, temporal_ids)
        return features

    def encode_patches(self, pixel_values: torch.Tensor, target_sizes: torch.Tensor) -> torch.Tensor:
        """What the vision tower makes of all slices: the resampler's input, [patches of all slices, vision width]."""
        patches: torch.Tensor = self.vpm(pixel_values, target_sizes)
        return patches

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
            input_ids: [batch, length]; `config.image_token_id` stands where features go.
            attention_mask: [batch, length], 0 on padding, where no feature goes.
            pixel_values: packed pixels of all slices of the batch, in the order of their tokens; see
                `get_image_features`.
            target_sizes: int [slices, 2].
            vision_features: [groups, query_num, width], what `get_image_features` returned, instead of pixels.
            temporal_ids: see `Resampler`.
            inputs_embeds: [batch, length, width] instead of `input_ids`, with features already in place.
            labels: [batch, length], not shifted, -100 where nothing is learnt.
            position_ids: [batch, length]; by default 0, 1, 2, … in each row.
            past_key_values: keys and values of earlier tokens.
            use_cache: whether to return them; by default as the configuration says.
            logits_to_keep: number of last positions whose logits are wanted; 0 for all.
            patch_features: [patches of all slices, vision width], what the vision tower returned, instead of pixels.
            loss_only: whether the loss alone is wanted, so that no logits are made but those it needs.
            **kwargs: of the language model, and of the loss (`num_items_in_batch`, `shift_labels`).

        Raises:
            ValueError: there are more or fewer places than features.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if patch_features is not None and not len(patch_features):
                inputs_embeds = inputs_embeds + self._nothing_seen(patch_features).to(inputs_embeds.dtype)
            elif vision_features is None and (pixel_values is not None or patch_features is not None):
                vision_features = self.get_image_features(pixel_values, target_sizes, temporal_ids, patch_features)
            if vision_features is not None:
                inputs_embeds = self._insert(vision_features, inputs_embeds, input_ids, attention_mask)
            elif patch_features is None and past_key_values is None and (self.training or is_deepspeed_zero3_enabled()):
                inputs_embeds = inputs_embeds + self._nothing_seen().to(inputs_embeds.dtype)
        elif any(given is not None for given in (pixel_values, vision_features, patch_features)):
            raise ValueError("Images need input_ids, which say where they go; inputs_embeds were given.")
        if loss_only and labels is not None:
            count = kwargs.pop("num_items_in_batch", None)
            hidden = self.get_decoder()(
                inputs_embeds=inputs_embeds,
                attention_mask=mask_that_hides(attention_mask, self.config.text_config._attn_implementation),
                position_ids=position_ids,
                use_cache=False,
                **kwargs,
            ).last_hidden_state
            head, vocabulary = self.get_output_embeddings(), self.config.text_config.vocab_size
            return supervised_loss(head, hidden, labels, vocabulary, count)
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

    def _insert(
        self,
        features: torch.Tensor,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Put features into their places, in their order."""
        if input_ids is None:
            raise ValueError("Images need input_ids, which say where they go.")
        places = self._places(input_ids, attention_mask)
        features = features.flatten(0, -2)
        wanted = int(places.sum())
        if wanted != len(features):
            raise ValueError(
                f"The tokens have {wanted} places for image features, but the images give {len(features)}."
            )
        return inputs_embeds.masked_scatter(places.unsqueeze(-1), features.to(inputs_embeds))

    def _places(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.image_token_id is None:
            raise ValueError(
                "config.image_token_id is not set and no tokenizer lay beside the weights to look it up in; set it to "
                "the id of <unk>."
            )
        places = input_ids == self.config.image_token_id
        # In 4.0 the same token also pads.
        if attention_mask is not None and attention_mask.dim() == 2:
            places = places & attention_mask[:, -input_ids.shape[1] :].bool()
        return places

    def _nothing_seen(self, patch_features: torch.Tensor | None = None) -> torch.Tensor:
        """Zero, by way of the whole vision side, or of what comes behind the tower where its features are given.

        A process whose batch has no image must still run these parameters: under DDP their gradients are waited for,
        and under ZeRO-3 and FSDP every process takes part in gathering them.
        """
        patch = self.config.vision_config.patch_size
        blank = torch.zeros(1, self.config.vision_config.num_channels, patch, patch, device=self.device)
        size = torch.ones(1, 2, dtype=torch.int32, device=self.device)
        if patch_features is not None:
            patch_features = patch_features.new_zeros(1, patch_features.shape[-1])
        return self.get_image_features(blank, size, patch_features=patch_features).sum() * 0

    def prepare_inputs_for_generation(  # type: ignore[override]  # as every model's: with its own inputs
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
        """Show the images once; later tokens find them in the cache."""
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
        """Repeat each sample for its beams: its features, computed once, and not its pixels."""
        pixel_values, target_sizes, temporal_ids, features = (
            model_kwargs.pop(name, None) for name in ("pixel_values", "target_sizes", "temporal_ids", "vision_features")
        )
        if expand_size > 1 and (pixel_values is not None or features is not None) and input_ids is not None:
            if features is None:
                features = self.get_image_features(pixel_values, target_sizes, temporal_ids)
            places = self._places(input_ids, model_kwargs.get("attention_mask")).sum(dim=1)
            of_sample = features.split((places // self.config.query_num).tolist())
            features = torch.cat([sample for sample in of_sample for _ in range(expand_size)])
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


def pad(packed: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay packed vectors out by group.

    Args:
        packed: [total, width], one group after the other.
        lengths: [groups], vectors of each.
        group: [total], number of each vector's group.

    Returns:
        [groups, longest, width], zero where there is none, and bool [groups, longest], whether there is one.
    """
    present = torch.arange(int(lengths.max()), device=packed.device) < lengths.unsqueeze(1)
    offset = torch.arange(len(packed), device=packed.device) - (lengths.cumsum(0) - lengths)[group]
    padded = packed.new_zeros(*present.shape, packed.shape[-1])
    return padded.index_put((group, offset), packed), present


def sincos_table(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and then cosines of positions, float32 [positions, width], as in "Attention is all you need".

    Frequencies are float32 powers as the published code computes them: at a video's frame 70,000 their last bit
    is worth several thousandths of the result.
    """
    frequencies = torch.from_numpy(_frequencies(width)).to(positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache
def _frequencies(width: int) -> NDArray[np.float32]:
    exponents = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2.0)
    # numpy's own float32 power is not rounded correctly on every machine.
    powers = np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)
    frequencies: NDArray[np.float32] = np.float32(1.0) / powers
    return frequencies


@lru_cache
def _nearest_positions(side: int, longest: int) -> NDArray[np.int64]:
    """Entry [n, i] is where the i-th of n patches falls on an axis of `side` learnt positions.

    The fractions i / n and the borders k / side are float32 as Idefics2 and the published code have them: where n
    divides `side`, rounding decides on which side of a border a patch falls.
    """
    borders = torch.arange(1 / side, 1.0, 1 / side, device="cpu")
    table = np.zeros((longest + 1, longest), dtype=np.int64)
    for number in range(1, longest + 1):
        fractions = torch.arange(0, 1 - 1e-6, 1 / number, device="cpu")
        table[number, :number] = torch.bucketize(fractions, borders, right=True).numpy()
    return table


AutoModelForImageTextToText.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration)
AutoModelForCausalLM.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration)
