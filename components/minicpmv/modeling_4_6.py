"""MiniCPM-V 4.6 and 4.7 are transformers' own classes; here they learn two things that no caller should have to know.

4.7 lays pictures out on a canvas of positions and asks each caller which tokens belong to pictures; without that it
refuses to train, and generates with plain positions without a word. The model knows its picture token, so it looks.

A batch without a picture skips the vision side. Where several processes train, the others then wait for its gradients
(DDP) or for its part of the weights (ZeRO-3, FSDP) forever; so a blank picture is run and counted times zero.
"""

from functools import wraps
from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config
from transformers.models.minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration as Transformers46
from transformers.models.minicpmv4_7 import MiniCPMV4_7Config
from transformers.models.minicpmv4_7 import MiniCPMV4_7ForConditionalGeneration as Transformers47


def _nothing_seen(model: PreTrainedModel) -> torch.Tensor:
    """Zero, by way of the whole vision side."""
    vision = model.config.vision_config
    side = 4  # patches: the least that merges twice
    device = model.device
    blank = torch.zeros(1, vision.num_channels, vision.patch_size, vision.patch_size * side * side, device=device)
    sizes = torch.full((1, 2), side, dtype=torch.int32, device=device)
    features: list[torch.Tensor] = cast(Any, model).get_image_features(blank, sizes).pooler_output
    return torch.cat(features).sum() * 0


def _run(model: PreTrainedModel, forward: Any, **inputs: Any) -> Any:
    """Forward, with the vision side run first whether or not there is a picture, as on every other process."""
    saw = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs"))
    if saw or inputs.get("past_key_values") is not None or not (model.training or is_deepspeed_zero3_enabled()):
        return forward(model, **inputs)
    nothing = _nothing_seen(model)
    output = forward(model, **inputs)
    output.logits = output.logits + nothing.to(output.logits.dtype)
    if output.loss is not None:
        output.loss = output.loss + nothing.to(output.loss.dtype)
    return output


class MiniCPMV4_6ForConditionalGeneration(Transformers46):  # noqa: N801 - as transformers has it, and config.json says
    """See the module."""

    @wraps(Transformers46.forward)  # generation and training look at the signature
    def forward(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> Any:  # type: ignore[override]
        """As transformers' own."""
        return _run(self, Transformers46.forward, input_ids=input_ids, **inputs)


class MiniCPMV4_7ForConditionalGeneration(Transformers47):  # noqa: N801
    """See the module."""

    @wraps(Transformers47.forward)
    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor | None = None, mm_token_type_ids: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        """As transformers' own."""
        if mm_token_type_ids is None and input_ids is not None and inputs.get("target_sizes") is not None:
            mm_token_type_ids = self._token_types(input_ids)
        return _run(self, Transformers47.forward, input_ids=input_ids, mm_token_type_ids=mm_token_type_ids, **inputs)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if model_kwargs.get("mm_token_type_ids") is None and not ids.is_floating_point():
            model_kwargs = model_kwargs | {"mm_token_type_ids": self._token_types(ids)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on picture tokens, 0 on words."""
        return (input_ids == cast(int, self.config.image_token_id)).int()


# A checkpoint of this type is loaded as the class above wherever transformers is asked to choose.
AutoModelForImageTextToText.register(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, exist_ok=True)
