"""The linear attention layers of 4.6 and 4.7: transformers' weights and numbers, computed faster, and packed samples.

What is linear is the time in the number of tokens: instead of all tokens before it, a token reads a state that each
token updates (see `delta_rule`). With fla's kernels installed for a GPU, those are used instead.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, apply_mask_to_padding_states, l2norm
from transformers.utils.import_utils import is_causal_conv1d_available, is_flash_linear_attention_available

from .delta_rule import gated_delta_rule, read_states
from .delta_rule_loop import delta_rule_loop_fits
from .layer_loops import convolve, loops_can_compute, loops_fit, normalize
from .packed import PACKING_ARGUMENTS, PackedSamples, SharedStates, packed_samples, shared_states

_LENGTH_EPSILON = 1e-6
"""What transformers' `l2norm` adds to the square of a length."""


def without_gpu_by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of transformers that calls a kernel of fla or causal-conv1d use torch for tensors of a CPU.

    transformers calls an installed kernel for every tensor, and these kernels run on a GPU alone.
    """
    plain: Callable[..., Any] = getattr(function, "__wrapped__", function)

    @wraps(function)
    def chosen(states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return (function if states.is_cuda else plain)(states, *arguments, **options)

    return chosen


def in_loop_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of transformers that computes the delta rule do so in loops where these fit."""

    @wraps(function)
    def chosen(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not delta_rule_loop_fits(key, value):
            plain: tuple[torch.Tensor, torch.Tensor | None] = function(query, key, value, g, beta, **options)
            return plain
        if options.get("use_qk_l2norm_in_kernel"):
            query, key = l2norm(query.float()), l2norm(key.float())
        copies = value.shape[2] // key.shape[2]
        query, key = (states.repeat_interleave(copies, dim=2) for states in (query, key))
        output, last = read_states(query, key, value, g, beta, initial=options.get("initial_state"))
        return output.to(value.dtype), last if options.get("output_final_state") else None

    return chosen


for _name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
    setattr(qwen3_5, _name, in_loop_on_cpu(without_gpu_by_torch(getattr(qwen3_5, _name))))
for _name in ("causal_conv1d_fn", "causal_conv1d_update"):
    setattr(qwen3_5, _name, without_gpu_by_torch(getattr(qwen3_5, _name)))


def missing_kernels(model: nn.Module) -> str:
    """A sentence if a model on a GPU computes linear attention without fla's kernels; otherwise empty."""
    needed = torch.cuda.is_available() and any(isinstance(module, LinearAttention) for module in model.modules())
    packages = {
        "flash-linear-attention": is_flash_linear_attention_available(),
        "causal-conv1d": is_causal_conv1d_available(),
    }
    missing = [name for name, is_there in packages.items() if not is_there]
    if not needed or not missing:
        return ""
    return (
        f"{' and '.join(missing)}: not installed, so linear attention is computed without these kernels, which takes "
        f"more memory and time; pip install {' '.join(missing)}"
    )


class LinearAttention(Qwen3_5GatedDeltaNet):
    """A linear attention layer with the same weights as its base class."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute the base class's result; in a packed row each sample is computed by itself.

        Args:
            hidden_states: [rows, length, width].
            cache_params: Cache of generation; if it is given, the base class computes the result.
            attention_mask: [rows, length], 0 on padding.
            **options: The arguments that describe packed samples; see `packed`.

        Returns:
            [rows, length, width].
        """
        samples = packed_samples(options)
        if cache_params is not None or is_flash_linear_attention_available():
            for name in PACKING_ARGUMENTS:
                options.pop(name, None)
            rows = hidden_states if samples is None else samples.unpack(hidden_states)
            output: torch.Tensor = super().forward(rows, cache_params, attention_mask, **options)
            return output if samples is None else samples.pack(output)

        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        mixed = self.in_proj_qkv(hidden_states)
        beta = self.in_proj_b(hidden_states).sigmoid()
        # In float32, because exp(A_log) can exceed the range of float16.
        log_decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
        parts = shared_states(options)
        if samples is not None and parts is None:
            mixed, beta, log_decay = (samples.unpack(states) for states in (mixed, beta, log_decay))
        length = mixed.shape[1]
        if samples is not None and parts is not None:
            mixed = ACT2FN[self.activation](_convolve(self.conv1d, mixed, samples))
        elif self.conv1d.bias is None and self.activation == "silu" and loops_can_compute(mixed, self.conv1d.weight):
            # Of any size: ZeRO-3 requires that all processes call the same modules with weights, or none does.
            mixed = convolve(mixed, self.conv1d.weight.squeeze(1))
        else:
            mixed = ACT2FN[self.activation](self.conv1d(mixed.transpose(1, 2))[..., :length]).transpose(1, 2)
        # The projection's output contains all queries, then all keys, then all values.
        queries_and_keys, values = mixed.split([2 * self.key_dim, self.value_dim], dim=-1)
        queries_and_keys = queries_and_keys.unflatten(-1, (2, self.num_k_heads, self.head_k_dim))
        queries_and_keys = _normalize_heads(queries_and_keys)
        if (copies := self.num_v_heads // self.num_k_heads) > 1:
            queries_and_keys = queries_and_keys.repeat_interleave(copies, dim=3)
        queries, keys = queries_and_keys.unbind(2)
        states = (queries, keys, values.unflatten(-1, (self.num_v_heads, -1)), log_decay, beta)
        attended = _attend_in_parts(states, parts) if parts else gated_delta_rule(*states)
        attended = attended.to(mixed.dtype)
        if samples is not None and parts is None:
            attended = samples.pack(attended)
        gate = self.in_proj_z(hidden_states).view(-1, self.head_v_dim)
        normed = self.norm(attended.reshape(gate.shape), gate).view(*hidden_states.shape[:2], -1)
        return torch.as_tensor(self.out_proj(normed))


def _normalize_heads(states: torch.Tensor) -> torch.Tensor:
    """Divide each head's vector, [..., width], by its length, in float32."""
    if not loops_fit(states):
        return torch.as_tensor(l2norm(states.float()))
    # x / √(Σx² + ε), as a norm by the root mean square.
    width = states.shape[-1]
    return normalize(states, states.new_full((width,), width**-0.5), _LENGTH_EPSILON / width)


def _convolve(convolution: nn.Conv1d, row: torch.Tensor, samples: PackedSamples) -> torch.Tensor:
    """Convolve each channel of a packed row, [1, tokens, channels]; a token sees those before it in its sample."""
    tokens = row.squeeze(0)
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[-1])])
    result = torch.zeros_like(tokens)
    for distance, weight in enumerate(convolution.weight[:, 0].flip(1).unbind(1)):
        result = result + padded.index_select(0, samples.before(distance)) * weight
    return result.unsqueeze(0) if convolution.bias is None else (result + convolution.bias).unsqueeze(0)


def _attend_in_parts(states: Sequence[torch.Tensor], parts: SharedStates) -> torch.Tensor:
    """Compute the rule for a packed row whose samples share tokens: each continues from the state behind these.

    Args:
        states: The arguments of `gated_delta_rule` for the row, [1, tokens, heads, …].
        parts: The parts of the row.

    Returns:
        float32 [1, tokens, heads, width of values].
    """
    of_beginnings, of_continuations = (
        [rows.unpack(part[:, tokens]) for part in states] for rows, tokens in zip(parts.rows, parts.tokens, strict=True)
    )
    begun, state = read_states(*of_beginnings)
    continued, _ = read_states(*of_continuations, initial=state[parts.origin])
    read = torch.cat([rows.pack(part) for rows, part in zip(parts.rows, (begun, continued), strict=True)], 1)
    return read[:, torch.cat(parts.tokens).argsort()]
