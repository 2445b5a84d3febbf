"""What is trained is kept in float32, whatever type the model computes in.

A number in bf16 has eight bits of precision: at usual learning rates most updates of a weight are less than half of its
last bit and would be lost, and so would most of the optimizer's averages. DeepSpeed keeps a float32 copy of what it
trains, and accelerate makes one for FSDP; without them the trained parameters themselves are float32 here, and autocast
computes with their bf16 values.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import PEFT_PREFIX
from minicpmv_finetune.minicpmv.generations import Generation

from .trainable import count_parameters, parameter_size

_WEIGHT_AND_GRADIENT, _MOMENTS = 8, 8  # bytes of a trained parameter, all in float32
_WHOLE, _DIVIDED = 2, 6  # the same in ZeRO-2: weight in 16 bits; its gradient, and the copy in float32
_WITH_TWO_MOMENTS = ("adamw_torch", "adamw_torch_fused")


def train_in_float32(model: nn.Module, generation: Generation) -> None:
    """Convert the trained parameters to float32, and keep the computation in the type of a bf16 autocast.

    Embeddings are no matrix product, so autocast leaves their output in the type of their weights. From there float32
    would spread: each layer adds its output to its input, and such a sum has the wider type.

    Args:
        model: The model, with or without adapters.
        generation: Its generation.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    # PEFT keeps a module that is trained whole beside the original one, so each name may occur several times.
    tower, tokens = f"{generation.vision_tower}.", generation.embed_tokens
    for name, module in model.named_modules():
        path = name.removeprefix(PEFT_PREFIX)
        if path == tokens or (path.startswith(tower) and path.endswith(".embeddings")):
            module.register_forward_hook(_cast_to_bf16)


def _cast_to_bf16(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    """Cast an output to bf16 under its autocast; float16 stays wide, because its range is too small for a sum."""
    device = output.device.type
    is_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return output.bfloat16() if is_bf16 else output


def require_memory(model: PreTrainedModel | nn.Module, training: TransformersArguments) -> None:
    """Refuse a training on a GPU that cannot hold what every step needs, before the weights are moved there.

    Raises:
        UserError: Weights, gradients and the optimizer's averages alone are larger than the GPU's memory.
    """
    if training.device.type != "cuda" or _keeps_parts_elsewhere(training):
        return
    config: Any = getattr(training, "hf_deepspeed_config", None)
    trained, _ = count_parameters(model)
    frozen = float(sum(_size_in_bytes(weight) for weight in model.parameters() if not weight.requires_grad))
    moments = _MOMENTS if str(training.optim).split(".")[-1].lower() in _WITH_TWO_MOMENTS else 0
    each: float = _WEIGHT_AND_GRADIENT + moments
    remedy = "divide the parameters among several GPUs by --strategy zero3 or fsdp2"
    if config is not None and config.is_zero2():
        each = _WHOLE + (_DIVIDED + moments) / training.world_size
    elif config is not None or training.fsdp:
        each, frozen = each / training.world_size, frozen / training.world_size
        remedy = "take more GPUs"
    needed = frozen + trained * each
    available = torch.cuda.get_device_properties(training.device).total_memory
    if needed > available:
        raise UserError(
            f"To train {trained:,} parameters, weights, gradients and optimizer need {needed / 1e9:,.0f} GB on each "
            f"GPU, which has {available / 1e9:,.0f} GB; train adapters (--use_lora true --tune_llm false), or {remedy}."
        )


def _keeps_parts_elsewhere(training: TransformersArguments) -> bool:
    """Whether DeepSpeed or FSDP keeps something in main memory, or what DeepSpeed divides is not known."""
    config: Any = getattr(training, "hf_deepspeed_config", None)
    if config is not None:
        return bool(config.is_offload() or not (config.is_zero2() or config.is_zero3()))
    fsdp: Any = training.fsdp_config
    return bool(training.fsdp and fsdp and fsdp.get("cpu_offload"))


def _size_in_bytes(weight: nn.Parameter) -> int:
    """Bytes of a weight, also if ZeRO-3 keeps only a part of it in this process."""
    return parameter_size(weight) * weight.element_size() if hasattr(weight, "ds_numel") else weight.nbytes
