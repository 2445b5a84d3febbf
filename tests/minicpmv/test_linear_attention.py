"""The gated delta rule compared with its definition, and the layer compared with transformers' layer."""

from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from minicpmv_finetune.minicpmv import linear_attention
from minicpmv_finetune.minicpmv.linear_attention import (
    LinearAttention,
    gated_delta_rule,
    missing_kernels,
    read_states,
    without_gpu_by_torch,
)
from minicpmv_finetune.minicpmv.packed import packing_arguments


def _rule_by_token(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Apply the definition of the rule to one token after the other."""
    state = values.new_zeros(*keys.shape[::2], keys.shape[-1], values.shape[-1])  # [rows, heads, width, width]
    outputs = []
    for q, k, v, g, b in zip(*(part.unbind(1) for part in (queries, keys, values, log_decay, beta)), strict=True):
        state = state * g.exp()[..., None, None]
        error = v - torch.einsum("rhkv,rhk->rhv", state, k)
        state = state + torch.einsum("rhk,rhv->rhkv", k, b.unsqueeze(-1) * error)
        outputs.append(torch.einsum("rhkv,rhk->rhv", state, q) * k.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize(("length", "width", "values"), [(1, 16, 16), (16, 16, 8), (75, 16, 24), (130, 80, 16)])
def test_chunks_equal_the_rule_applied_token_by_token(length: int, width: int, values: int) -> None:
    torch.manual_seed(0)
    sizes = [(2, length, 3, width), (2, length, 3, width), (2, length, 3, values), (2, length, 3), (2, length, 3)]
    arguments = [torch.randn(size) for size in sizes]
    arguments[:2] = [nn.functional.normalize(part, dim=-1) for part in arguments[:2]]
    arguments[3], arguments[4] = -5 * arguments[3].abs(), arguments[4].sigmoid()
    arguments[3][:, ::7] = -200.0  # these tokens erase the state
    arguments[4][:, ::5] = 0.0  # these tokens write nothing
    results = []
    for rule in (gated_delta_rule, _rule_by_token):
        leaves = [part.clone().requires_grad_() for part in arguments]
        output = rule(*leaves)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        assert expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6 * max(float(expected.abs().max()), 1.0))


@pytest.fixture
def layers() -> tuple[LinearAttention, Qwen3_5GatedDeltaNet]:
    """This project's and transformers' layer with the same weights, and twice as many value heads as key heads."""
    torch.manual_seed(0)
    # transformers declares the layer for the configuration of the complete model, but builds it from this one.
    config: Any = Qwen3_5TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
    )
    ours, theirs = LinearAttention(config, 0), Qwen3_5GatedDeltaNet(config, 0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_and_its_gradients_equal_transformers(
    layers: tuple[LinearAttention, Qwen3_5GatedDeltaNet], dtype: torch.dtype
) -> None:
    hidden, mask = torch.randn(2, 70, 32), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    results = []
    for layer in layers:
        states = hidden.to(dtype).requires_grad_()
        output = layer.to(dtype)(states, attention_mask=mask)
        output.square().sum().backward()
        results.append(
            {"output": output.detach(), "states": states.grad} | {n: p.grad for n, p in layer.named_parameters()}
        )
    ours, theirs = results
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in theirs.items():
        assert value is not None
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=atol, msg=name)


def test_the_rule_is_computed_in_float32_under_autocast() -> None:
    arguments = [torch.randn(1, 40, 2, 16).requires_grad_() for _ in range(3)]
    arguments += [-torch.rand(1, 40, 2).requires_grad_(), torch.rand(1, 40, 2).requires_grad_()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = gated_delta_rule(*arguments)
        results.append([output, *torch.autograd.grad(output.sum(), arguments)])
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


def test_states_continue_where_they_ended() -> None:
    arguments = [torch.randn(2, 70, 2, 16) for _ in range(3)] + [-torch.rand(2, 70, 2), torch.rand(2, 70, 2)]
    arguments[1] = torch.nn.functional.normalize(arguments[1], dim=-1)
    for argument in arguments:
        argument.requires_grad_()
    whole = gated_delta_rule(*arguments)
    first, state = read_states(*(argument[:, :37] for argument in arguments))
    second, _ = read_states(*(argument[:, 37:] for argument in arguments), initial=state)
    parts = torch.cat([first, second], 1)
    torch.testing.assert_close(parts, whole)
    weights = torch.randn_like(whole)
    expected, found = (torch.autograd.grad((output * weights).sum(), arguments) for output in (whole, parts))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_packed_samples_equal_single_samples(
    layers: tuple[LinearAttention, Qwen3_5GatedDeltaNet],
) -> None:
    lengths = [5, 40, 1, 17]
    packed = torch.randn(1, sum(lengths), 32)
    arguments = packing_arguments(lengths)
    del arguments["position_ids"]
    single = torch.cat([layers[1](sample) for sample in packed.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(layers[0](packed, **arguments), single, rtol=1e-4, atol=1e-6)


def test_a_kernel_is_not_called_for_tensors_of_a_cpu() -> None:
    def plain(states: torch.Tensor, **options: Any) -> str:
        return "torch"

    @wraps(plain)
    def kernel(states: torch.Tensor, **options: Any) -> str:
        return "kernel"

    assert without_gpu_by_torch(kernel)(torch.zeros(1), activation="silu") == "torch"


def test_kernels_that_are_missing_on_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_kernels(model) == ""
    model[0].__class__ = LinearAttention
    assert "flash-linear-attention and causal-conv1d: not installed" in missing_kernels(model)
    monkeypatch.setattr(linear_attention, "is_flash_linear_attention_available", lambda: True)
    assert missing_kernels(model).startswith("causal-conv1d: not installed")
    monkeypatch.setattr(linear_attention, "is_causal_conv1d_available", lambda: True)
    assert missing_kernels(model) == ""
