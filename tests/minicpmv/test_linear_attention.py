"""The layer of linear attention compared with transformers' layer."""

from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from minicpmv_finetune.minicpmv import linear_attention
from minicpmv_finetune.minicpmv.linear_attention import LinearAttention, missing_kernels, without_gpu_by_torch
from minicpmv_finetune.minicpmv.packed import packing_arguments


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


def test_packed_samples_equal_single_samples(
    layers: tuple[LinearAttention, Qwen3_5GatedDeltaNet],
) -> None:
    lengths = [5, 40, 1, 17]
    packed = torch.randn(1, sum(lengths), 32)
    arguments = packing_arguments(lengths)
    del arguments["position_ids"]
    single = torch.cat([layers[1](sample) for sample in packed.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(layers[0](packed, **arguments), single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "length"), [("torch_chunk_gated_delta_rule", 70), ("torch_recurrent_gated_delta_rule", 1)]
)
def test_a_generation_takes_the_loops_and_equals_transformers(name: str, length: int) -> None:
    chosen: Any = getattr(qwen3_5, name)
    sizes = [(2, length, 2, 16), (2, length, 2, 16), (2, length, 4, 8), (2, length, 4), (2, length, 4)]
    query, key, value, decay, beta = (torch.randn(size) for size in sizes)
    options = {
        "initial_state": torch.randn(2, 4, 16, 8),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    with torch.inference_mode():
        ours, theirs = (
            rule(query, key, value, -decay.abs(), beta.sigmoid(), **options) for rule in (chosen, chosen.__wrapped__)
        )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours[1], theirs[1])  # it was computed in another way


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
