"""Adapters that begin with a part of the base's weights: PiSSA and LoRA-GA, as PEFT computes them.

Such an adapter takes over a part of a weight, W, so that training begins with W - s·B₀·A₀ and s·B₀·A₀ beside it. What
begins so is remembered: it is subtracted from the result, which is then a plain adapter, of twice the rank, for the
base model as it is on disk. Each checkpoint contains it too, because a continued training must begin with the same
weights, and the gradients of LoRA-GA are not the same bits each time.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune.errors import UserError

from .arguments import LoraArguments

GRADIENT_SAMPLES = 64
"""Samples on which LoRA-GA estimates the gradient, as many as its authors took."""
_FILE = "initial_adapter.safetensors"
_ADAPTER = "default"
_GA = "lora_ga"

InitialAdapter = Mapping[str, torch.Tensor]
"""A₀ and B₀ of each layer, by their names in an adapter's file."""


def changes_base(lora: LoraArguments) -> bool:
    """Whether the adapters begin with a part of the base's weights."""
    return lora.init_lora_weights.lower() != "true"


def require_rank(model: nn.Module, lora: LoraArguments) -> None:
    """Refuse a rank for which a layer has too few singular values.

    Raises:
        UserError: There is such a layer.
    """
    # LoRA-GA takes those of A and of B from different ones.
    needed = lora.lora_r * (2 if lora.init_lora_weights.lower() == _GA else 1)
    for name, layer in _layers(model):
        available = min(layer.in_features, layer.out_features)
        if available < needed:
            raise UserError(
                f"--init_lora_weights {lora.init_lora_weights}: needs {needed} singular values of each layer, and "
                f"{name} has {available}; lower --lora_r."
            )


def begin_adapters(
    model: nn.Module, lora: LoraArguments, seed: int, compute_gradients: Callable[[], None]
) -> InitialAdapter:
    """Give the adapters their first values, and take these out of the base's weights.

    Args:
        model: Model with adapters that are still zero, on the device that computes.
        lora: `init_lora_weights` chooses how they begin.
        seed: Seed of the approximate singular values.
        compute_gradients: Runs forward and backward passes for LoRA-GA.

    Returns:
        The first values.
    """
    kind = lora.init_lora_weights.lower()
    layers = dict(_layers(model))
    initial: dict[str, torch.Tensor] = {}
    devices = sorted({weight.device.index for weight in model.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of layers of the first inputs
        if kind == _GA:
            targets = [f"{name}.base_layer" for name in layers]
            kind_of_peft: Any = _GA
            config = LoraConfig(target_modules=targets, init_lora_weights=kind_of_peft, lora_ga_config=LoraGAConfig())
            preprocess_loraga(model, config, compute_gradients)
        for name, layer in layers.items():
            down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            weight, dtypes = layer.get_base_layer().weight.data.clone(), (down.dtype, up.dtype)
            if kind == _GA:
                layer.lora_ga_init(_ADAPTER, LoraGAConfig())
            else:
                layer.pissa_init(_ADAPTER, kind)
            # PEFT computes in float32 or in the base's type; training has a type of its own.
            for part, dtype in zip((layer.lora_A, layer.lora_B), dtypes, strict=True):
                part[_ADAPTER].weight.data = part[_ADAPTER].weight.data.to(weight.device, dtype).contiguous()
            layer.get_base_layer().weight.data = weight
            initial |= {key: value.detach().cpu().clone() for key, value in _values(name, layer)}
    begin_again(model, initial)
    return initial


def begin_again(model: nn.Module, initial: InitialAdapter) -> None:
    """Take first values out of the base's weights, as at the beginning of the training that is continued.

    Args:
        model: Model with adapters and the base's own weights; the adapters' values are not changed.
        initial: The first values.

    Raises:
        UserError: The values are not those of this model's adapters.
    """
    layers = dict(_layers(model))
    if {key for name, layer in layers.items() for key, _ in _values(name, layer)} != initial.keys():
        raise UserError("The checkpoint's first values of the adapters belong to other layers; start with another one.")
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight
            down, up = (initial[f"{name}.lora_{part}.weight"].to(weight.device, torch.float32) for part in "AB")
            taken = (up @ down) * layer.scaling[_ADAPTER]
            weight.data = (weight.data.float() - taken).to(weight.dtype)


def read_initial(checkpoint: Path) -> InitialAdapter:
    """The first values in a checkpoint.

    Raises:
        UserError: It has none.
    """
    if not (checkpoint / _FILE).is_file():
        raise UserError(f"{checkpoint}: lacks {_FILE}, so it cannot be continued; give another checkpoint.")
    return load_file(checkpoint / _FILE)


class InitialAdapterSaver(TrainerCallback):
    """Writes the first values into each checkpoint."""

    def __init__(self, initial: InitialAdapter) -> None:
        """Create the callback; it must come before the one that seals checkpoints."""
        self.initial = initial

    def on_save(self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write them beside the adapter."""
        if state.is_world_process_zero:
            save_file(dict(self.initial), Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            yield name, module


def _values(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.lora_A.weight", layer.lora_A[_ADAPTER].weight
    yield f"{name}.lora_B.weight", layer.lora_B[_ADAPTER].weight
