"""What FSDP2 needs to divide these models, with or without adapters."""

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel


def prepare_for_fsdp(base: PreTrainedModel, trained: nn.Module) -> None:
    """Make a model divisible by FSDP2.

    Args:
        base: The base model itself.
        trained: The base model, or PEFT's wrapper around it.
    """
    keep_present_classes(base)
    part_originals(trained)


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
