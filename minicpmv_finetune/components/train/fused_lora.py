"""A linear layer and its adapter as one autograd operation: y = W·x + b + s·B·A·dropout(x).

PEFT computes the same in six operations, and stores the dropped-out input of every layer for the backward pass. Here
scaling and sums are part of the matrix products, and of dropout one byte per element is stored: whether it was kept.
On a CPU floats are stored, because a product with bytes takes six times as long there, and a compiled loop draws them:
0.1 ms for 1,920 × 128 elements, where torch's `bernoulli_` takes 1.1. `make bench` measures the gain. What PEFT offers
beyond plain LoRA (DoRA, several adapters at once, adapters that are merged or turned off), and weights that are
quantized or partitioned between devices, use PEFT's own computation.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from minicpmv_finetune.minicpmv.compiled import compile_loop

_DRAW = ("void(uint32, uint32, uint32, Array(float32, 1, 'C'))",)


def fuse_adapters(model: nn.Module) -> list[str]:
    """Make a model's plain adapters compute in one operation, if their layers are whole on this device.

    Args:
        model: Model wrapped by PEFT; weights and names stay.

    Returns:
        Why some adapters are left to PEFT; nothing if there is none.
    """
    reasons = set()
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if reason := _unknown_kind(module):
            reasons.add(reason)
        elif type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear
    return sorted(reasons)


def _unknown_kind(layer: LoraLayer) -> str:
    """What this computation does not know about an adapter; empty if it knows it."""
    base = type(layer.get_base_layer())
    if base is not nn.Linear:
        return f"weights of the type {base.__name__}"
    if variants := {type(variant).__name__ for variant in layer.lora_variant.values()}:
        return ", ".join("DoRA" if name.startswith("Dora") else name for name in sorted(variants))
    if layer.merged or any(part.bias is not None for part in (*layer.lora_A.values(), *layer.lora_B.values())):
        return "biases of the adapters, or adapters that are merged"
    return ""


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer, computed in one operation where that is possible."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output [..., outputs] from x [..., inputs]."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(active) != 1 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = active
        matrices = (self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif any(matrix is not None and matrix.dtype != dtype for matrix in matrices):
            # Adapters in float32 on a model in bfloat16 compute in float32, which is a separate product.
            return super().forward(x)
        rate = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        kept, factor = _draw_dropout(x, dtype, rate) if rate else (None, 1.0)
        cast = [None if matrix is None else matrix.to(dtype) for matrix in matrices]
        output: torch.Tensor = _FusedLora.apply(x.to(dtype), *cast, self.scaling[name] * factor, kept)
        return output


def _draw_dropout(x: torch.Tensor, dtype: torch.dtype, rate: float) -> tuple[torch.Tensor, float]:
    """Which elements of x dropout keeps, as 0 and 1 of type bool or, on a CPU, dtype; and the factor of those."""
    on_cpu = x.device.type == "cpu"
    draw = compile_loop(_draw, _DRAW) if on_cpu and rate < 1 and not torch.compiler.is_compiling() else None
    if draw is None:
        kept = torch.empty_like(x, dtype=dtype if on_cpu else torch.bool).bernoulli_(1 - rate)
    else:
        drawn = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        # From torch's generator, which a checkpoint contains.
        first, second = torch.empty(2, dtype=torch.int64, device=x.device).random_(2**32).tolist()
        draw(first, second, round(rate * 2**32), drawn.view(-1).numpy())
        kept = drawn.to(dtype)
    return kept, 1 / (1 - rate) if rate < 1 else 0.0


def _draw(first: int, second: int, limit: int, kept: NDArray[np.float32]) -> None:
    """Draw 1 for each element whose number of 32 random bits is not below a limit, otherwise 0.

    The number is a hash of the element's place and of two random numbers: the rounds of lowbias32 (Chris Wellons,
    "Prospecting for Hash Functions", 2018), with the second number between them.
    """
    for place in range(kept.size):
        bits = np.uint32(np.uint32(place) + first)
        bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
        bits = np.uint32((bits ^ (bits >> np.uint32(15)) ^ second) * np.uint32(0x846CA68B))
        bits = np.uint32(bits ^ (bits >> np.uint32(16)))
        kept[place] = bits >= limit


class _FusedLora(torch.autograd.Function):
    """Output and gradients of a linear layer with its adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the output.

        Args:
            ctx: Autograd's context.
            x: [..., inputs].
            weight: W, [outputs, inputs].
            bias: b, [outputs].
            lora_a: A, [rank, inputs].
            lora_b: B, [outputs, rank].
            scale: s, with the factor of the elements that dropout kept.
            kept: Which of x's elements dropout keeps, as 0 and 1, [..., inputs]; None without dropout.
        """
        output = F.linear(x, weight, bias)
        hidden = F.linear(x if kept is None else x * kept, lora_a)
        output.view(-1, output.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), lora_b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, kept, hidden)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b, kept, hidden = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad_output = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        flat_x, hidden = x.reshape(-1, x.shape[-1]), hidden.view(-1, hidden.shape[-1])
        mask = None if kept is None else kept.view(flat_x.shape)
        grad_hidden = (grad_output @ lora_b).mul_(ctx.scale)
        grad_x = None
        if needs_x:
            grad_x = grad_output @ weight
            if mask is None:
                grad_x.addmm_(grad_hidden, lora_a)
            else:
                grad_x.addcmul_(grad_hidden @ lora_a, mask)
            grad_x = grad_x.view(x.shape)
        grad_a = grad_hidden.t() @ (flat_x if mask is None else flat_x * mask) if needs_a else None
        grad_b = (grad_output.t() @ hidden).mul_(ctx.scale) if needs_b else None
        grad_weight = grad_output.t() @ flat_x if needs_weight else None
        grad_bias = grad_output.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None
