"""The gated delta rule, the state update of 4.6's and 4.7's linear attention: transformers' numbers, computed faster.

A head has a state matrix S from keys to values. A token with query q, key k, value v, decay a and write strength b
(beta) updates the state and then reads from it:

    S ← a·S + b·k·(v - a·Sᵀ·k)ᵀ,   output = Sᵀ·q     (the gated delta rule, Yang et al. 2024, arXiv:2412.06464)

On a CPU, compiled loops follow this definition (see `delta_rule_loop`). Otherwise, as in that paper, the tokens are
processed in chunks, and the work inside a chunk consists of products of small matrices. transformers (like fla) loops
over the chunks in Python with seven operations for each chunk, and autograd records and reverses each of them. Here
each chunk is reduced to the two matrices by which it changes the state, S ← A·S + B. Then the loop has one operation
for each chunk, everything else is computed for all chunks at once, and the backward pass is written by hand. Because a
chunk costs so little, chunks can be as short as a head is wide, which minimizes the total work.

Time of the chunks on the clock, for four sequences of 520 tokens with four heads, forward and backward on two cores:
heads of width 16 8 ms instead of transformers' 20.8, width 32 22 ms instead of 34; width 128 (two sequences of 700
tokens, eight heads) 101 ms instead of 132.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from .delta_rule_loop import delta_rule_in_loop, delta_rule_loop_fits

_MIN_CHUNK, _MAX_CHUNK = 16, 64
"""Bounds of the number of tokens in a chunk; between them a chunk has as many tokens as a head is wide."""


def gated_delta_rule(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Compute what each token reads from the states of its heads, in float32; the module describes the rule.

    Args:
        queries: [rows, length, heads, width], each of length one.
        keys: [rows, length, heads, width], each of length one.
        values: [rows, length, heads, width of values].
        log_decay: [rows, length, heads], logarithm of the factor by which a token decays the state, at most 0.
        beta: [rows, length, heads], write strength of a token.

    Returns:
        float32 [rows, length, heads, width of values], multiplied by width ** -0.5 as in softmax attention.
    """
    return read_states(queries, keys, values, log_decay, beta)[0]


def read_states(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the result of `gated_delta_rule`, and the states behind the last token.

    Args:
        queries: As for `gated_delta_rule`, and so are the next four.
        keys: See there.
        values: See there.
        log_decay: See there.
        beta: See there.
        initial: float32 [rows, heads, width, width of values], states before the first token; by default zero.

    Returns:
        The result, and the states as float32 [rows, heads, width, width of values].
    """
    if delta_rule_loop_fits(keys, values):
        return delta_rule_in_loop(queries, keys, values, log_decay, beta, initial)
    rows, length, heads, width = keys.shape
    size = min(max(width, _MIN_CHUNK), _MAX_CHUNK)
    chunks = -(-length // size)

    def split_chunks(states: torch.Tensor) -> torch.Tensor:
        """From [rows, length, heads, …] to [chunks, rows · heads, size, …], with zeros after the end."""
        padded = F.pad(states.float(), (0, 0, 0, 0, 0, chunks * size - length))
        parts = padded.view(rows, chunks, size, heads, -1)
        return parts.permute(1, 0, 3, 2, 4).reshape(chunks, rows * heads, size, -1)

    arguments = (queries * width**-0.5, keys, values, log_decay.unsqueeze(-1), beta.unsqueeze(-1))
    with torch.autocast(keys.device.type, enabled=False):
        states = None if initial is None else initial.flatten(0, 1)
        output, last = _ChunkedDeltaRule.apply(*map(split_chunks, arguments), states)
    joined = output.view(chunks, rows, heads, size, -1).permute(1, 0, 3, 2, 4)
    return joined.reshape(rows, chunks * size, heads, -1)[:, :length], last.unflatten(0, (rows, heads))


class _ChunkedDeltaRule(torch.autograd.Function):
    """The rule for q, k, v [chunks, rows, size, width], log decays g and betas b [chunks, rows, size, 1].

    The states before the first token, [rows, width, width of values], may be given; those behind the last are returned.

    Let G be the cumulative sum of g within a chunk. The decays in the chunk are

        D = exp(Gᵢ - Gⱼ) for j ≤ i, else 0       from token j to token i               `decay_between`
        e = exp(G)                               from the chunk's start to each token  `from_start`
        f = exp(G of the last token - G)         from each token to the chunk's end    `to_end`
        l = exp(G of the last token)             over the whole chunk                  `whole`

    and the chunk computes (ᵀ transposes the last two dimensions)

        T = I + strictly lower triangle of b·(k kᵀ)·D,   P = (q kᵀ)·D                  `scores`
        X = T⁻¹ [b·v | b·e·k] = [U | W]                                                `uw`
        Y = (f·k)ᵀ X = [Y₁ | Y₂],   Z = P X = [Z₁ | Z₂]
        S' = (l·I - Y₂) S + Y₁,     output = (e·q - Z₂) S + Z₁                         `transition`, `readout`
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        b: torch.Tensor,
        initial: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        size, width = k.shape[2], v.shape[3]
        cumulative = g.cumsum(2)
        from_start, to_end, whole = _decays(cumulative)
        upper = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
        decay_between = (cumulative - cumulative.transpose(2, 3)).masked_fill_(upper, -torch.inf).exp_()
        products = torch.cat([q, k], 2) @ k.transpose(2, 3)
        scores = products[:, :, :size] * decay_between
        overlap = products[:, :, size:] * decay_between
        identity = torch.eye(size, device=k.device).expand_as(overlap)
        inverse = torch.linalg.solve_triangular(overlap * b, identity, upper=False, unitriangular=True)
        uw = inverse @ torch.cat([v * b, k * (b * from_start)], 3)
        y, z = (k * to_end).transpose(2, 3) @ uw, scores @ uw
        transition = y[..., width:].neg()
        transition.diagonal(dim1=2, dim2=3).add_(whole.squeeze(3))
        state = torch.zeros_like(y[..., :width])
        if initial is not None:
            state[0] = initial
        for chunk in range(len(state) - 1):
            torch.baddbmm(y[chunk, ..., :width], transition[chunk], state[chunk], out=state[chunk + 1])
        last = torch.baddbmm(y[-1, ..., :width], transition[-1], state[-1])
        readout = (q * from_start).sub_(z[..., width:])
        ctx.save_for_backward(
            q, k, v, b, cumulative, decay_between, scores, overlap, inverse, uw, transition, state, readout
        )
        return (readout @ state).add_(z[..., :width]), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, b, cumulative, decay_between, scores, overlap, inverse, uw, transition, state, readout = (
            ctx.saved_tensors
        )
        size, width = k.shape[2], v.shape[3]
        grad_output = torch.zeros_like(v) if grad_outputs[0] is None else grad_outputs[0]
        from_start, to_end, whole = _decays(cumulative)
        # Output and states. grad_state[i] is the gradient of the state after chunk i; the loop goes from last to first.
        grad_readout = grad_output @ state.transpose(2, 3)
        direct = readout.transpose(2, 3) @ grad_output
        grad_state = torch.zeros_like(direct)
        if grad_outputs[1] is not None:
            grad_state[-1] = grad_outputs[1]
        for chunk in range(len(state) - 1, 0, -1):
            torch.baddbmm(
                direct[chunk], transition[chunk].transpose(1, 2), grad_state[chunk], out=grad_state[chunk - 1]
            )
        grad_initial = None
        if ctx.needs_input_grad[5]:
            grad_initial = torch.baddbmm(direct[0], transition[0].transpose(1, 2), grad_state[0])
        grad_transition = grad_state @ state.transpose(2, 3)
        # Gradients of decays are with respect to their logarithms.
        grad_whole = grad_transition.diagonal(dim1=2, dim2=3).sum(2)[..., None, None] * whole
        grad_y = torch.cat([grad_state, grad_transition.neg_()], 3)
        grad_z = torch.cat([grad_output, -grad_readout], 3)
        grad_scores = grad_z @ uw.transpose(2, 3)
        grad_uw = (scores.transpose(2, 3) @ grad_z).add_((k * to_end) @ grad_y)
        grad_k = (uw @ grad_y.transpose(2, 3)).mul_(to_end)
        grad_to_end = (grad_k * k).sum(3, keepdim=True)
        # The triangular system T X = [b·v | b·e·k].
        grad_right = inverse.transpose(2, 3) @ grad_uw
        grad_system = (grad_right @ uw.transpose(2, 3)).neg_().tril_(-1)
        grad_bv, grad_bek = grad_right[..., :width], grad_right[..., width:]
        grad_b_keys = (grad_bek * k).sum(3, keepdim=True).mul_(from_start)
        grad_b_pairs = grad_system * overlap
        grad_b = (grad_bv * v).sum(3, keepdim=True).add_(grad_b_keys).add_(grad_b_pairs.sum(3, keepdim=True))
        grad_k.addcmul_(grad_bek, b * from_start)
        grad_q = grad_readout.mul_(from_start)
        # The decays, all of which are functions of the cumulative sum.
        grad_between = (grad_scores * scores).addcmul_(grad_b_pairs, b)
        grad_cumulative = (grad_q * q).sum(3, keepdim=True).addcmul_(grad_b_keys, b).sub_(grad_to_end)
        grad_cumulative.add_(grad_between.sum(3, keepdim=True)).sub_(grad_between.sum(2).unsqueeze(3))
        grad_cumulative[:, :, -1:] += grad_whole + grad_to_end.sum(2, keepdim=True)
        # The products q kᵀ and k kᵀ.
        grad_products = torch.cat([grad_scores.mul_(decay_between), grad_system.mul_(decay_between).mul_(b)], 2)
        grad_left = grad_products @ k
        grad_q.add_(grad_left[:, :, :size])
        grad_k.add_(grad_left[:, :, size:]).add_(grad_products.transpose(2, 3) @ torch.cat([q, k], 2))
        return grad_q, grad_k, grad_bv * b, grad_cumulative.flip(2).cumsum(2).flip(2), grad_b, grad_initial


def _decays(cumulative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decays from the chunk's start to each token, from each token to the chunk's end, and over the whole chunk."""
    last = cumulative[:, :, -1:]
    return cumulative.exp(), (last - cumulative).exp(), last.exp()
