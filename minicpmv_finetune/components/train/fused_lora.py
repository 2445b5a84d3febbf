"""A linear layer and its adapter as one autograd operation: y = W·x + b + s·B·A·dropout(x).

PEFT computes the same in six operations, and stores the dropped-out input of every layer for the backward pass. Here
scaling and sums are part of the matrix products, and of dropout one byte per element is stored: whether it was kept.
On a CPU dropout draws sixteen bits per element instead of a float, which took a tenth of a training step there, and
stores floats, because a product with bytes takes six times as long there. (A rate of 0.05 is then 3,277 / 65,536, and
the scale is that of the actual rate.) `make bench` measures the gain. What PEFT offers beyond plain LoRA (DoRA, several
adapters at once, adapters that are merged or turned off), and weights that are quantized or partitioned between
devices, use PEFT's own computation.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

_LEVELS = 2**16


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
    if x.device.type != "cpu":
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate)
        return kept, 1 / (1 - rate) if rate < 1 else 0.0
    level = round(rate * _LEVELS)
    if level == _LEVELS:
        return torch.zeros_like(x, dtype=dtype), 0.0
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: x.numel()].view(x.shape)
    # The comparison writes directly in the type of the multiplication, which saves a pass over the data.
    kept = torch.ge(drawn, level - _LEVELS // 2, out=torch.empty_like(x, dtype=dtype))
    return kept, _LEVELS / (_LEVELS - level)


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
