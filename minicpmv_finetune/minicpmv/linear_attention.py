"""Gated linear attention of 4.6 and 4.7 in training: the same numbers, faster, and packed samples each by itself.

A head keeps a matrix S from keys to values. A token with key k, value v, decay a and share b makes it

    S ← a·S + b·k·(v - a·Sᵀ·k)ᵀ                 (the gated delta rule, Yang et al. 2024, arXiv:2412.06464)

and reads Sᵀ·q. As there, tokens go through in chunks: all within a chunk is products of small matrices. transformers
(as fla) has Python go from chunk to chunk with seven operations each, and has autograd undo every one. Here a chunk is
brought down to the two matrices by which it changes the state, S ← A·S + B: from chunk to chunk goes one operation,
everything else is computed for all chunks at once, and the gradient is written out. With so little to do for a chunk,
chunks can be as small as a head is wide, which is the least work.

Of four sequences of 520 tokens, four heads, forward and backward on two cores: of width 16 20.8 → 8 ms, of width 32
34 → 22; of 128 (two of 700, eight heads) 132 → 101. Where fla's kernels are installed for a GPU they are used.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, apply_mask_to_padding_states, l2norm
from transformers.utils.import_utils import is_flash_linear_attention_available

from .packed import packed_samples

_LEAST, _MOST = 16, 64
"""Tokens of a chunk; between these as many as a head is wide."""


class LinearAttention(Qwen3_5GatedDeltaNet):
    """A layer with the weights of the class above."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As the class above, [rows, length, width] of each; what no sample of a packed row may see is kept from it."""
        samples = packed_samples(options)
        if cache_params is not None or is_flash_linear_attention_available():
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
                options.pop(name, None)
            rows = hidden_states if samples is None else samples.unpack(hidden_states)
            output: torch.Tensor = super().forward(rows, cache_params, attention_mask, **options)
            return output if samples is None else samples.pack(output)

        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        mixed, share, step = (project(hidden_states) for project in (self.in_proj_qkv, self.in_proj_b, self.in_proj_a))
        # In float16 exp(A_log) might be infinite.
        decay = -self.A_log.float().exp() * F.softplus(step.float() + self.dt_bias)
        share = share.sigmoid()
        if samples is not None:
            mixed, share, decay = (samples.unpack(states) for states in (mixed, share, decay))
        length = mixed.shape[1]
        mixed = ACT2FN[self.activation](self.conv1d(mixed.transpose(1, 2))[..., :length]).transpose(1, 2)
        keys, values = mixed.split([2 * self.key_dim, self.value_dim], dim=-1)
        # Queries and keys lie one behind the other.
        keys = l2norm(keys.unflatten(-1, (2, self.num_k_heads, self.head_k_dim)).float())
        queries, keys = keys.repeat_interleave(self.num_v_heads // self.num_k_heads, dim=3).unbind(2)
        read = gated_delta_rule(queries, keys, values.unflatten(-1, (self.num_v_heads, -1)), decay, share)
        read = read.to(mixed.dtype)
        if samples is not None:
            read = samples.pack(read)
        gate = self.in_proj_z(hidden_states).view(-1, self.head_v_dim)
        normed = self.norm(read.reshape(gate.shape), gate).view(*hidden_states.shape[:2], -1)
        return torch.as_tensor(self.out_proj(normed))


def gated_delta_rule(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decay: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """What each token reads from the states of its heads, computed in float32; see the module.

    Args:
        queries: [rows, length, heads, width], of length one each.
        keys: the same.
        values: [rows, length, heads, width of values].
        decay: [rows, length, heads], logarithms of what is left of the state, at most 0.
        share: [rows, length, heads], how much of a value is written.

    Returns:
        [rows, length, heads, width of values], in float32, as flash attention times width ** -0.5.
    """
    rows, length, heads, width = keys.shape
    size = min(max(width, _LEAST), _MOST)
    chunks = -(-length // size)

    def in_chunks(states: torch.Tensor) -> torch.Tensor:
        """From [rows, length, heads, …] to [chunks, rows · heads, size, …], zero behind the end."""
        parts = F.pad(states.float(), (0, 0, 0, 0, 0, chunks * size - length)).view(rows, chunks, size, heads, -1)
        return parts.permute(1, 0, 3, 2, 4).reshape(chunks, rows * heads, size, -1)

    told = (queries * width**-0.5, keys, values, decay.unsqueeze(-1), share.unsqueeze(-1))
    with torch.autocast(keys.device.type, enabled=False):
        read: torch.Tensor = _DeltaRule.apply(*map(in_chunks, told))
    together = read.view(chunks, rows, heads, size, -1).permute(1, 0, 3, 2, 4)
    return together.reshape(rows, chunks * size, heads, -1)[:, :length]


class _DeltaRule(torch.autograd.Function):
    """Of q, k, v [chunks, rows, size, width], decays g and shares b [chunks, rows, size, 1]; ᵀ is of the last two.

    With G the sum of a chunk's decays up to a token, D = exp(Gᵢ - Gⱼ) for j ≤ i, e = exp(G), f = exp(G of the last - G)
    and l = exp(G of the last):

        T = I + below the diagonal of b·(k kᵀ)·D,   X = T⁻¹ [b·v | b·e·k],   P = (q kᵀ)·D
        Y = (f·k)ᵀ X = [Yv | Yk],   Z = P X = [Zv | Zk]
        S' = (l·I - Yk) S + Yv,   output = (e·q - Zk) S + Zv
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        size, width = k.shape[2], v.shape[3]
        total = g.cumsum(2)
        e, f, l = _decays(total)  # noqa: E741
        later = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
        between = (total - total.transpose(2, 3)).masked_fill_(later, -torch.inf).exp_()
        products = torch.cat([q, k], 2) @ k.transpose(2, 3)
        attention = products[:, :, :size] * between
        overlap = products[:, :, size:] * between
        one = torch.eye(size, device=k.device).expand_as(overlap)
        inverse = torch.linalg.solve_triangular(overlap * b, one, upper=False, unitriangular=True)
        x = inverse @ torch.cat([v * b, k * (b * e)], 3)
        y, z = (k * f).transpose(2, 3) @ x, attention @ x
        change = y[..., width:].neg()
        change.diagonal(dim1=2, dim2=3).add_(l.squeeze(3))
        state = torch.zeros_like(y[..., :width])
        for now in range(len(state) - 1):
            torch.baddbmm(y[now, ..., :width], change[now], state[now], out=state[now + 1])
        reading = (q * e).sub_(z[..., width:])
        ctx.save_for_backward(q, k, v, b, total, between, attention, overlap, inverse, x, change, state, reading)
        return (reading @ state).add_(z[..., :width])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, b, total, between, attention, overlap, inverse, x, change, state, reading = ctx.saved_tensors
        size, width, of_output = k.shape[2], v.shape[3], gradients[0]
        e, f, l = _decays(total)  # noqa: E741
        # Through the output, and from the last chunk to the first through the states.
        of_reading = of_output @ state.transpose(2, 3)
        through = reading.transpose(2, 3) @ of_output
        of_state = torch.zeros_like(through)
        for now in range(len(state) - 1, 0, -1):
            torch.baddbmm(through[now], change[now].transpose(1, 2), of_state[now], out=of_state[now - 1])
        of_change = of_state @ state.transpose(2, 3)
        of_last = of_change.diagonal(dim1=2, dim2=3).sum(2)[..., None, None] * l
        of_y = torch.cat([of_state, of_change.neg_()], 3)
        of_z = torch.cat([of_output, -of_reading], 3)
        of_attention = of_z @ x.transpose(2, 3)
        of_x = (attention.transpose(2, 3) @ of_z).add_((k * f) @ of_y)
        of_k = (x @ of_y.transpose(2, 3)).mul_(f)
        of_f = (of_k * k).sum(3, keepdim=True)
        # Through the triangular system.
        solved = inverse.transpose(2, 3) @ of_x
        of_system = (solved @ x.transpose(2, 3)).neg_().tril_(-1)
        of_values, of_keys = solved[..., :width], solved[..., width:]
        of_e = (of_keys * k).sum(3, keepdim=True).mul_(e)
        overlapping = of_system * overlap
        of_b = (of_values * v).sum(3, keepdim=True).add_(of_e).add_(overlapping.sum(3, keepdim=True))
        of_k.addcmul_(of_keys, b * e)
        of_q = of_reading.mul_(e)
        # Through the decays.
        pairs = (of_attention * attention).addcmul_(overlapping, b)
        of_total = (of_q * q).sum(3, keepdim=True).addcmul_(of_e, b).sub_(of_f)
        of_total.add_(pairs.sum(3, keepdim=True)).sub_(pairs.sum(2).unsqueeze(3))
        of_total[:, :, -1:] += of_last + of_f.sum(2, keepdim=True)
        # Through the products.
        of_products = torch.cat([of_attention.mul_(between), of_system.mul_(between).mul_(b)], 2)
        left = of_products @ k
        of_q.add_(left[:, :, :size])
        of_k.add_(left[:, :, size:]).add_(of_products.transpose(2, 3) @ torch.cat([q, k], 2))
        return of_q, of_k, of_values * b, of_total.flip(2).cumsum(2).flip(2), of_b


def _decays(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is left at each token of a chunk's start, at its end of each token, and at its end of its start."""
    last = total[:, :, -1:]
    return total.exp(), (last - total).exp(), last.exp()
