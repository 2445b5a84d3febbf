"""A linear layer with its adapter as one step of autograd: y = W·x + b + s·B·A·dropout(x).

PEFT computes the same in six, and keeps the dropped-out input of every layer for the backward pass. Here scaling and
sums happen within the products, and on a CPU dropout draws sixteen bits for an element instead of a float, whose share
of a training step there was a tenth. (A rate of 0.05 is then 3,277 / 65,536, and the scale is that of the rate in
fact.) `make bench` tells what it gains. What PEFT does beside plain LoRA (DoRA, several adapters at once, adapters that
are merged or turned off) and weights that are quantized, or parted between devices, go PEFT's own way.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

_LEVELS = 2**16


def fuse_adapters(model: nn.Module) -> None:
    """Make a model's plain adapters, on layers that are whole on this device, compute in one step.

    Args:
        model: as PEFT wrapped it; weights and names stay.
    """
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.__class__ = FusedLoraLinear


def _is_plain(layer: LoraLinear) -> bool:
    simple = type(layer.base_layer) is nn.Linear and not layer.lora_variant and not layer.merged
    return simple and not any(part.bias is not None for part in (*layer.lora_A.values(), *layer.lora_B.values()))


class FusedLoraLinear(LoraLinear):
    """See the module."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the class above, [..., inputs] to [..., outputs]."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(active) != 1 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = active
        matrices = (self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif any(matrix is not None and matrix.dtype != dtype for matrix in matrices):
            # Adapters of float32 on a model of bfloat16 compute in float32, which is another product.
            return super().forward(x)
        rate = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        kept = _kept(x, dtype, rate) if rate else None
        cast = [None if matrix is None else matrix.to(dtype) for matrix in matrices]
        output: torch.Tensor = _Fused.apply(x.to(dtype), *cast, self.scaling[name], kept)
        return output


def _kept(x: torch.Tensor, dtype: torch.dtype, rate: float) -> torch.Tensor:
    """Of each element of x what is left by dropout: 0, or the scale of the others."""
    if x.device.type != "cpu":
        return F.dropout(torch.ones_like(x, dtype=dtype), rate)
    dropped = round(rate * _LEVELS)
    if dropped == _LEVELS:
        return torch.zeros_like(x, dtype=dtype)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: x.numel()].view(x.shape)
    # Compared straight into the type it is multiplied in, which saves a pass.
    kept = torch.ge(drawn, dropped - _LEVELS // 2, out=torch.empty_like(x, dtype=dtype))
    return kept.mul_(_LEVELS / (_LEVELS - dropped))


class _Fused(torch.autograd.Function):
    """Of x [..., inputs], W [outputs, inputs], its bias, A [rank, inputs], B [outputs, rank], s, dropout's factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        output = F.linear(x, weight, bias)
        inner = F.linear(x if kept is None else x * kept, a)
        output.view(-1, output.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, kept, inner)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, kept, inner = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        outer = gradients[0].reshape(-1, gradients[0].shape[-1])
        flat, inner = x.reshape(-1, x.shape[-1]), inner.view(-1, inner.shape[-1])
        factors = None if kept is None else kept.view(flat.shape)
        through = (outer @ b).mul_(ctx.scale)
        of_x = None
        if needs_x:
            of_x = outer @ weight
            if factors is None:
                of_x.addmm_(through, a)
            else:
                of_x.addcmul_(through @ a, factors)
            of_x = of_x.view(x.shape)
        of_a = through.t() @ (flat if factors is None else flat * factors) if needs_a else None
        of_b = (outer.t() @ inner).mul_(ctx.scale) if needs_b else None
        of_weight = outer.t() @ flat if needs_weight else None
        of_bias = outer.sum(0) if needs_bias else None
        return of_x, of_weight, of_bias, of_a, of_b, None, None
