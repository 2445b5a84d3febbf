"""A linear layer and its adapter as one autograd operation: y = W·x + b + s·B·A·dropout(x).

PEFT computes the same in six operations, and stores the dropped-out input of every layer for the backward pass. Here
scaling and sums are part of the matrix products, and of dropout one byte per element is stored: whether it was kept.
In float32 on a CPU the dropped-out input is stored instead of the input, and compiled loops compute which elements are
kept while they drop them: 0.1 ms for 1,920 × 128 elements, where torch's `bernoulli_` alone takes 1.1. `make bench`
measures the gain. What PEFT offers beyond plain LoRA (DoRA, several adapters at once, adapters that are merged or
turned off), and weights that are quantized or partitioned between devices, use PEFT's own computation.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from minicpmv_finetune.minicpmv.compiled import compile_loop, loops_can_read

_LOOP = ("void(Array(float32, 1, 'C'), uint32, uint32, uint32, Array(float32, 1, 'C'))",)


class _Drawn(NamedTuple):
    """Which elements dropout keeps: those whose 32 bits of `_draw` are not below `limit`."""

    first: int
    second: int
    limit: int


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


def _draw_dropout(x: torch.Tensor, dtype: torch.dtype, rate: float) -> tuple[torch.Tensor | _Drawn, float]:
    """Which elements of x dropout keeps, and the factor of those.

    They are described by numbers where loops compute in dtype; otherwise as 0 and 1 of type bool or, on a CPU, where a
    product with bytes takes six times as long, of dtype.
    """
    factor = 1 / (1 - rate) if rate < 1 else 0.0
    on_cpu = x.device.type == "cpu"
    if rate >= 1 or not loops_can_read(x) or _compile(_drop) is None:
        return torch.empty_like(x, dtype=dtype if on_cpu else torch.bool).bernoulli_(1 - rate), factor
    # From torch's generator, which a checkpoint contains.
    first, second = torch.empty(2, dtype=torch.int64, device=x.device).random_(2**32).tolist()
    drawn = _Drawn(first, second, round(rate * 2**32))
    if dtype == torch.float32:
        return drawn, factor
    return _keep(torch.ones(x.shape, device=x.device), drawn).to(dtype), factor


def _keep(x: torch.Tensor, kept: torch.Tensor | _Drawn) -> torch.Tensor:
    """Set the elements of x that are not kept to zero."""
    if isinstance(kept, torch.Tensor):
        return x * kept
    x = x.contiguous()
    dropped = torch.empty_like(x)
    _compile(_drop)(x.detach().view(-1).numpy(), *kept, dropped.view(-1).numpy())
    return dropped


def _add_kept(total: torch.Tensor, part: torch.Tensor, kept: torch.Tensor | _Drawn) -> None:
    """Add the elements of a part that are kept to a total; both are contiguous."""
    if isinstance(kept, torch.Tensor):
        total.addcmul_(part, kept.reshape(total.shape))
    else:
        _compile(_add_drawn)(part.view(-1).numpy(), *kept, total.view(-1).numpy())


def _compile(loop: Any) -> Any:
    return compile_loop(loop, _LOOP, calls=(_draw,))


def _draw(place: int, first: np.uint32, second: np.uint32) -> np.uint32:
    """32 random bits: a hash of a place and of two random numbers.

    The rounds of lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018), with the second number between
    them.
    """
    bits = np.uint32(np.uint32(place) + first)
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
    bits = np.uint32((bits ^ (bits >> np.uint32(15)) ^ second) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


def _drop(
    x: NDArray[np.float32], first: np.uint32, second: np.uint32, limit: np.uint32, dropped: NDArray[np.float32]
) -> None:
    for place in range(x.size):
        dropped[place] = x[place] if _draw(place, first, second) >= limit else np.float32(0)


def _add_drawn(
    part: NDArray[np.float32], first: np.uint32, second: np.uint32, limit: np.uint32, total: NDArray[np.float32]
) -> None:
    for place in range(part.size):
        total[place] += part[place] if _draw(place, first, second) >= limit else np.float32(0)


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
        kept: torch.Tensor | _Drawn | None,
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
            kept: Which of x's elements dropout keeps, [..., inputs]; None without dropout.
        """
        output = F.linear(x, weight, bias)
        dropped = x if kept is None else _keep(x, kept)
        hidden = F.linear(dropped, lora_a)
        output.view(-1, output.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), lora_b.t(), alpha=scale)
        ctx.scale, ctx.drawn = scale, kept if isinstance(kept, _Drawn) else None
        of_whole_weights = ctx.drawn is None or ctx.needs_input_grad[1]  # otherwise gradients need dropped inputs alone
        inputs = (x if of_whole_weights else None, dropped if ctx.drawn else None, None if ctx.drawn else kept)
        ctx.save_for_backward(*inputs, weight, lora_a, lora_b, hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dropped, kept, weight, lora_a, lora_b, hidden = ctx.saved_tensors
        kept = kept if ctx.drawn is None else ctx.drawn
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad_output = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        hidden = hidden.view(-1, hidden.shape[-1])
        grad_hidden = grad_output @ (lora_b * ctx.scale)
        grad_x = None
        if needs_x:
            grad_x = grad_output @ weight
            if kept is None:
                grad_x.addmm_(grad_hidden, lora_a)
            else:
                _add_kept(grad_x, grad_hidden @ lora_a, kept)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], weight.shape[1])
        grad_a = None
        if needs_a:
            if dropped is None:
                dropped = x if kept is None else _keep(x, kept)
            grad_a = grad_hidden.t() @ dropped.reshape(-1, dropped.shape[-1])
        grad_b = (grad_output.t() @ hidden).mul_(ctx.scale) if needs_b else None
        grad_weight = grad_output.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        grad_bias = grad_output.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None
