"""MiniCPM-V 4.6 and 4.7 are transformers' own classes; here they learn two things that no caller should have to know.

4.7 lays pictures out on a canvas of positions and asks each caller which tokens belong to pictures; without that it
refuses to train, and generates with plain positions without a word. The model knows its picture token, so it looks.

A batch without a picture skips the vision side. Where several processes train, the others then wait for its gradients
(DDP) or for its part of the weights (ZeRO-3, FSDP) forever; so a blank picture is run and counted times zero. It runs
where pictures would, inside the model between embeddings and language model: ZeRO-3 wants the same order everywhere.
"""

from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6Model
from transformers.models.minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration as Transformers46
from transformers.models.minicpmv4_7 import MiniCPMV4_7Config, MiniCPMV4_7Model
from transformers.models.minicpmv4_7 import MiniCPMV4_7ForConditionalGeneration as Transformers47

_SIDE = 4
"""Of the blank picture in patches: the least that merges twice."""


def _with_blank_picture(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs; without a picture, as embeddings that the vision side had its part in."""
    saw = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs"))
    if saw or inputs.get("past_key_values") is not None or not (model.training or is_deepspeed_zero3_enabled()):
        return inputs
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    vision, device = model.config.vision_config, embeds.device
    blank = torch.zeros(1, vision.num_channels, vision.patch_size, vision.patch_size * _SIDE**2, device=device)
    sizes = torch.full((1, 2), _SIDE, dtype=torch.int32, device=device)
    nothing = torch.cat(model.get_image_features(blank, sizes).pooler_output).sum() * 0
    return inputs | {"input_ids": None, "inputs_embeds": embeds + nothing.to(embeds.dtype)}


class _Model46(MiniCPMV4_6Model):
    def forward(self, **inputs: Any) -> Any:
        return super().forward(**_with_blank_picture(self, inputs))


class _Model47(MiniCPMV4_7Model):
    def forward(self, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")
        if ids is not None and inputs.get("target_sizes") is not None and inputs.get("mm_token_type_ids") is None:
            inputs["mm_token_type_ids"] = self.token_types(ids)
        told = _with_blank_picture(self, inputs)
        if told is not inputs:
            # Else the shift that an earlier batch's pictures left would count for this one.
            self.rope_deltas = None
        return super().forward(**told)

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on picture tokens, 0 on words."""
        return torch.as_tensor(input_ids == self.config.image_token_id).int()


class MiniCPMV4_6ForConditionalGeneration(Transformers46):  # noqa: N801 - as transformers has it, and config.json says
    """See the module."""

    def __init__(self, config: MiniCPMV4_6Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model46


class MiniCPMV4_7ForConditionalGeneration(Transformers47):  # noqa: N801
    """See the module."""

    def __init__(self, config: MiniCPMV4_7Config) -> None:
        super().__init__(config)
        self.model.__class__ = _Model47

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
