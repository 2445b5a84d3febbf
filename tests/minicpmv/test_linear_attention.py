"""The gated delta rule against its definition, token by token, and the layer against that of transformers."""

import pytest
import torch
from torch import nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from minicpmv_finetune.minicpmv.linear_attention import LinearAttention, gated_delta_rule
from minicpmv_finetune.minicpmv.packed import packing_arguments


def _token_by_token(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decay: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    state = values.new_zeros(*keys.shape[::2], keys.shape[-1], values.shape[-1])  # [rows, heads, width, width]
    read = []
    for q, k, v, g, b in zip(*(part.unbind(1) for part in (queries, keys, values, decay, share)), strict=True):
        state = state * g.exp()[..., None, None]
        missing = v - torch.einsum("rhkv,rhk->rhv", state, k)
        state = state + torch.einsum("rhk,rhv->rhkv", k, b.unsqueeze(-1) * missing)
        read.append(torch.einsum("rhkv,rhk->rhv", state, q) * k.shape[-1] ** -0.5)
    return torch.stack(read, dim=1)


@pytest.mark.parametrize(("length", "width", "values"), [(1, 16, 16), (16, 16, 8), (75, 16, 24), (130, 80, 16)])
def test_chunks_give_what_the_rule_gives_token_by_token(length: int, width: int, values: int) -> None:
    torch.manual_seed(0)
    sizes = [(2, length, 3, width), (2, length, 3, width), (2, length, 3, values), (2, length, 3), (2, length, 3)]
    given = [torch.randn(size) for size in sizes]
    given[:2] = [nn.functional.normalize(part, dim=-1) for part in given[:2]]
    given[3], given[4] = -5 * given[3].abs(), given[4].sigmoid()
    given[3][:, ::7] = -200.0  # all is forgotten
    given[4][:, ::5] = 0.0  # nothing is written
    found = []
    for rule in (gated_delta_rule, _token_by_token):
        leaves = [part.clone().requires_grad_() for part in given]
        read = rule(*leaves)
        (read * torch.linspace(-1, 1, read.numel()).view(read.shape)).sum().backward()
        found.append([read.detach(), *(leaf.grad for leaf in leaves)])
    for ours, defined in zip(*found, strict=True):
        assert defined is not None
        torch.testing.assert_close(ours, defined, rtol=1e-4, atol=2e-6 * max(float(defined.abs().max()), 1.0))


@pytest.fixture
def layers() -> tuple[LinearAttention, Qwen3_5GatedDeltaNet]:
    """Ours and transformers', of the same weights, with twice as many heads of values as of keys."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
    )
    ours, theirs = (kind(config, 0) for kind in (LinearAttention, Qwen3_5GatedDeltaNet))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_learns_what_that_of_transformers_learns(
    layers: tuple[LinearAttention, Qwen3_5GatedDeltaNet], dtype: torch.dtype
) -> None:
    hidden, mask = torch.randn(2, 70, 32), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    found = []
    for layer in layers:
        states = hidden.to(dtype).requires_grad_()
        output = layer.to(dtype)(states, attention_mask=mask)
        output.square().sum().backward()
        found.append(
            {"output": output.detach(), "states": states.grad} | {n: p.grad for n, p in layer.named_parameters()}
        )
    ours, theirs = found
    for name, value in theirs.items():
        assert value is not None
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[name], value, rtol=close, atol=close * float(value.abs().max()), msg=name)


def test_the_rule_is_computed_in_float32_whatever_is_cast_around_it() -> None:
    given = [torch.randn(1, 40, 2, 16).requires_grad_() for _ in range(3)]
    given += [-torch.rand(1, 40, 2).requires_grad_(), torch.rand(1, 40, 2).requires_grad_()]
    found = []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            read = gated_delta_rule(*given)
        found.append([read, *torch.autograd.grad(read.sum(), given)])
    for plain, within in zip(*found, strict=True):
        assert torch.equal(plain, within)


def test_samples_of_a_packed_row_read_what_they_would_alone(
    layers: tuple[LinearAttention, Qwen3_5GatedDeltaNet],
) -> None:
    lengths = [5, 40, 1, 17]
    packed = torch.randn(1, sum(lengths), 32)
    told = packing_arguments(lengths)
    del told["position_ids"]
    alone = torch.cat([layers[1](row) for row in packed.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(layers[0](packed, **told), alone, rtol=1e-4, atol=1e-6)
