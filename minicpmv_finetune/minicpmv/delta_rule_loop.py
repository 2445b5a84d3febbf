"""The gated delta rule on a CPU: compiled loops that follow its definition, one token after the other.

`delta_rule` describes the rule. Products of small matrices, which a GPU needs, are slow on a CPU: for heads of width 16
torch spends most of the time on calls. A loop over the tokens does a quarter of their arithmetic, and a head's state
stays in the processor's cache. Rows and heads are divided among as many threads as torch uses.

The backward pass goes from the last token to the first. It needs the state before each token, and a state is a matrix,
so the forward pass keeps the states before every sixteenth token, and the backward pass computes those between again.

Processor time forward and backward, for four rows of 480 tokens with four heads, compared with `delta_rule`'s chunks:
heads of width 16 3.8 instead of 15 ms, width 32 9.3 instead of 28 ms, 64 33 instead of 62 ms, 128 109 instead of 138
ms. Where states decay fast, chunks contain denormal numbers, which are slow: with decays of e^-1.5 on average, heads of
width 128 took 1,500 ms in chunks and 115 ms here. Results differ by rounding, 1e-6 of the largest value.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from .compiled import compile_loop, loops_can_read, run_in_threads

_KEPT_EVERY = 16  # tokens
_WIDEST = 128  # a state of wider heads leaves the cache, and products of matrices are as fast
_VECTORS, _NUMBERS, _STATES, _KEPT = (f"Array(float32, {dimensions}, 'C')" for dimensions in (4, 3, 4, 5))
_INPUTS = f"{_VECTORS}, {_VECTORS}, {_VECTORS}, {_NUMBERS}, {_NUMBERS}"
_FORWARD = (f"void({_INPUTS}, {_KEPT}, {_STATES}, {_VECTORS}, int64, int64)",)
_BACKWARD = (f"void({_INPUTS}, {_KEPT}, {_VECTORS}, {_STATES}, {_INPUTS}, int64, int64)",)

Array = NDArray[np.float32]


def delta_rule_loop_fits(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `delta_rule_in_loop` can compute the rule here, and is the faster way."""
    is_narrow = max(keys.shape[-1], values.shape[-1]) <= _WIDEST
    return is_narrow and loops_can_read(keys) and compile_loop(_read, _FORWARD, True) is not None


def delta_rule_in_loop(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `delta_rule.read_states` computes, from the same arguments, of any floating-point type."""
    rows, _, heads, width = keys.shape
    if initial is None:
        initial = keys.new_zeros(rows, heads, width, values.shape[-1])
    arguments = (queries * width**-0.5, keys, values, log_decay, beta, initial)
    output, last = _DeltaRule.apply(*(part.float().contiguous() for part in arguments))
    return output, last


class _DeltaRule(torch.autograd.Function):
    """q, k [rows, length, heads, width], v [rows, length, heads, width of values], g and b [rows, length, heads]."""

    @staticmethod
    def forward(ctx: Any, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, initial = arguments
        rows, length, heads, width = inputs[1].shape
        kept_states = -(-length // _KEPT_EVERY) if any(ctx.needs_input_grad) else 0
        kept = initial.new_empty(rows, heads, kept_states, width, initial.shape[-1])
        state, output = initial.clone(), torch.empty_like(inputs[2])
        loop = compile_loop(_read, _FORWARD, True)
        run_in_threads(loop, (*inputs, kept, state, output), rows * heads, _updated(inputs))
        ctx.save_for_backward(*inputs, kept)
        ctx.set_materialize_grads(False)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_last: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        rows, _, heads, _ = inputs[1].shape
        grad_output = torch.zeros_like(inputs[2]) if grad_output is None else grad_output.contiguous()
        # Of the state after a token; in the end, of the one before the first token.
        grad_state = torch.zeros_like(kept[:, :, 0]) if grad_last is None else grad_last.clone().contiguous()
        gradients = [torch.empty_like(part) for part in inputs]
        loop = compile_loop(_read_backward, _BACKWARD, True)
        arguments = (*inputs, kept, grad_output, grad_state, *gradients)
        run_in_threads(loop, arguments, rows * heads, _updated(inputs))
        return *gradients, grad_state


def _updated(inputs: Sequence[torch.Tensor]) -> int:
    """The number of elements of states that all tokens update: keys by values."""
    return inputs[1].numel() * inputs[2].shape[-1]


def _read(
    q: Array, k: Array, v: Array, g: Array, b: Array, kept: Array, state: Array, output: Array, first: int, last: int
) -> None:
    """Apply the rule to some of the states, which are numbered row by row."""
    _, length, heads, width = k.shape
    values = v.shape[3]
    written, read = np.empty(values, np.float32), np.empty(values, np.float32)
    for number in range(first, last):
        row, head = number // heads, number % heads
        s = state[row, head]
        for token in range(length):
            if kept.shape[2] and token % _KEPT_EVERY == 0:
                kept[row, head, token // _KEPT_EVERY] = s
            key, query, value = k[row, token, head], q[row, token, head], v[row, token, head]
            decay, strength = np.exp(g[row, token, head]), b[row, token, head]
            written[:] = 0
            for i in range(width):
                for j in range(values):
                    written[j] += s[i, j] * key[i]
            for j in range(values):
                written[j] = strength * (value[j] - decay * written[j])
            read[:] = 0
            for i in range(width):
                for j in range(values):
                    s[i, j] = decay * s[i, j] + key[i] * written[j]
                    read[j] += s[i, j] * query[i]
            output[row, token, head] = read


def _read_backward(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    b: Array,
    kept: Array,
    grad_output: Array,
    grad_state: Array,
    grad_q: Array,
    grad_k: Array,
    grad_v: Array,
    grad_g: Array,
    grad_b: Array,
    first: int,
    last: int,
) -> None:
    """Compute the gradients of some of the states, of which `grad_state` has those after the last token.

    One function, because what it computes again takes 1.8 times as long when that is a function which this one calls.
    """
    _, length, heads, width = k.shape
    values = v.shape[3]
    states = np.empty((_KEPT_EVERY + 1, width, values), np.float32)  # before each token of a part, and behind it
    recalled, written = np.empty((2, _KEPT_EVERY, values), np.float32)  # Sᵀk, and what a token writes for its key
    grad_written = np.empty(values, np.float32)
    for number in range(first, last):
        row, head = number // heads, number % heads
        grad_s = grad_state[row, head]
        for part in range((length - 1) // _KEPT_EVERY, -1, -1):
            begin = part * _KEPT_EVERY
            tokens = min(_KEPT_EVERY, length - begin)
            states[0] = kept[row, head, part]
            for place in range(tokens):
                token = begin + place
                key, value = k[row, token, head], v[row, token, head]
                decay, strength = np.exp(g[row, token, head]), b[row, token, head]
                s, after = states[place], states[place + 1]
                recalled[place] = 0
                for i in range(width):
                    for j in range(values):
                        recalled[place, j] += s[i, j] * key[i]
                for j in range(values):
                    written[place, j] = strength * (value[j] - decay * recalled[place, j])
                for i in range(width):
                    for j in range(values):
                        after[i, j] = decay * s[i, j] + key[i] * written[place, j]
            for place in range(tokens - 1, -1, -1):
                token = begin + place
                key, query, value = k[row, token, head], q[row, token, head], v[row, token, head]
                decay, strength, grad_o = (
                    np.exp(g[row, token, head]),
                    b[row, token, head],
                    grad_output[row, token, head],
                )
                s, after = states[place], states[place + 1]
                # What the token reads, and how much of the state's gradient comes from what it wrote.
                grad_written[:] = 0
                for i in range(width):
                    grad_query = np.float32(0)
                    for j in range(values):
                        grad_s[i, j] += query[i] * grad_o[j]
                        grad_written[j] += grad_s[i, j] * key[i]
                        grad_query += after[i, j] * grad_o[j]
                    grad_q[row, token, head, i] = grad_query
                grad_strength, grad_decay = np.float32(0), np.float32(0)
                for j in range(values):
                    grad_strength += grad_written[j] * (value[j] - decay * recalled[place, j])
                    grad_v[row, token, head, j] = strength * grad_written[j]
                    grad_decay -= strength * grad_written[j] * recalled[place, j]
                    grad_written[j] *= -strength * decay  # from here on the gradient of `recalled`
                grad_b[row, token, head] = grad_strength
                for i in range(width):
                    grad_key = np.float32(0)
                    for j in range(values):
                        grad_key += grad_s[i, j] * written[place, j] + s[i, j] * grad_written[j]
                        grad_decay += grad_s[i, j] * s[i, j]
                        grad_s[i, j] = decay * grad_s[i, j] + key[i] * grad_written[j]
                    grad_k[row, token, head, i] = grad_key
                grad_g[row, token, head] = grad_decay * decay
