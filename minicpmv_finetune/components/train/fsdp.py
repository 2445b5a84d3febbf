"""What FSDP2 needs to divide these models, with or without adapters.

What is trained is kept in float32 (`masters.py`). accelerate converts it before it divides the model, so that for a
moment each process has all of it in main memory: 8 × 32 GB for 8 billion parameters on eight GPUs. Here each process
converts its own part afterwards, on its GPU. docs/performance.md has the memory of both.
"""

from types import SimpleNamespace
from typing import Any

import accelerate.accelerator
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .arguments import TrainingArguments


def is_fsdp2(training: TrainingArguments) -> bool:
    """Whether FSDP divides the model, and not its older version, which a configuration of the user's own may name."""
    config: Any = training.fsdp_config
    return bool(training.fsdp) and int((config or {}).get("version", 2)) == 2


def prepare_for_fsdp(base: PreTrainedModel, trained: nn.Module) -> None:
    """Make a model divisible by FSDP2, and let accelerate divide it by `divide`.

    Args:
        base: The base model itself.
        trained: The base model, or PEFT's wrapper around it.
    """
    keep_present_classes(base)
    part_originals(trained)
    accelerate.accelerator.fsdp2_prepare_model = divide


def divide(accelerator: Any, model: nn.Module) -> nn.Module:
    """Divide a model as accelerate does, and convert what is trained to float32 afterwards.

    Args:
        accelerator: accelerate's Accelerator.
        model: The model on the CPU, with weights of one type apart from adapters.

    Returns:
        The same model, of which this process keeps a part.
    """
    mesh, parallelism = (getattr(accelerator, name, None) for name in ("torch_device_mesh", "parallelism_config"))
    without_conversion = SimpleNamespace(
        state=accelerator.state,
        device=accelerator.device,
        is_main_process=accelerator.is_main_process,
        torch_device_mesh=mesh,
        parallelism_config=parallelism,
        mixed_precision="no",
    )
    divided: nn.Module = fsdp2_prepare_model(without_conversion, model)
    for parameter in divided.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
            # An assignment to `data` would not reach this process's part, which is a tensor inside the parameter.
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().float()))
    return divided


def keep_present_classes(model: PreTrainedModel) -> None:
    """Leave out of the classes that FSDP divides a model into those that it does not contain.

    The language model of 4.6 and 4.7 names the layers of Qwen's own vision tower too, and accelerate would refuse the
    model without them.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in present}


def part_originals(model: nn.Module) -> None:
    """Give every user of the original of a module that is trained whole a copy of its own.

    PEFT keeps the frozen original beside the copy that is trained. A tied head shares the original's matrix, and FSDP
    refuses a parameter in two of its groups: embeddings and head are one each. A tied head without such a wrapper is
    left as it is, because accelerate puts it into the group of the embeddings.
    """
    originals = {
        parameter
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for parameter in wrapper.original_module.parameters()
    }
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            elif parameter in originals:
                seen.add(parameter)
