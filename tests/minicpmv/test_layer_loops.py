"""Layers that compute in loops on a CPU have the outputs and gradients of transformers' layers."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import activations

from minicpmv_finetune.minicpmv import layer_loops, linear_attention
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.layer_loops import convolve, loops_can_compute, loops_fit, multiply_gated, normalize


@pytest.fixture(autouse=True)
def _loops_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_loops, "_WORTH_A_LOOP", 0)


def _plain_norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weight


def _plain_convolution(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    padded = F.pad(states.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=len(weight))).transpose(1, 2)


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "norm": (partial(normalize, epsilon=1e-6), _plain_norm, [(4, 5, 24), (24,)]),
    "norm of heads": (partial(normalize, epsilon=1e-6), _plain_norm, [(2, 7, 3, 8), (8,)]),
    "gated product": (multiply_gated, lambda gate, states: F.silu(gate) * states, [(4, 5, 24), (4, 5, 24)]),
    "GELU": (lambda x: layer_loops._Gelu()(x), partial(F.gelu, approximate="tanh"), [(4, 5, 24)]),
    "convolution": (convolve, _plain_convolution, [(4, 9, 24), (24, 4)]),
    "convolution of few tokens": (convolve, _plain_convolution, [(4, 2, 24), (24, 4)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_and_gradients_are_those_of_the_definition(case: str, transposed: bool, threads: int) -> None:
    ours, definition, shapes = CASES[case]
    torch.manual_seed(0)
    arguments = [torch.randn(shape) * 3 for shape in shapes]
    if transposed:  # the same values, which are not contiguous
        arguments = [part.mT.contiguous().mT if part.dim() > 1 else part for part in arguments]
    results = []
    for function, dtype in ((ours, torch.float32), (definition, torch.float64)):
        leaves = [part.to(dtype).requires_grad_() for part in arguments]
        output = function(*leaves)
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape)
        results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_extreme_values_give_what_torch_gives() -> None:
    gate = torch.tensor([-1e9, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, float("nan"), float("inf")])
    one = torch.ones_like(gate)
    torch.testing.assert_close(multiply_gated(gate, one), F.silu(gate), equal_nan=True, rtol=1e-5, atol=1e-25)
    gelu = layer_loops._Gelu()(gate[2:10])
    torch.testing.assert_close(gelu, F.gelu(gate[2:10], approximate="tanh"), equal_nan=True, rtol=1e-5, atol=1e-25)
    assert bool(normalize(torch.tensor([[float("nan"), 1.0]]), torch.ones(2), 1e-6).isnan().all())
    assert normalize(torch.zeros(1, 2), torch.ones(2), 1e-6).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda one: one.version)
def test_models_compute_the_same_without_loops(
    generation: Any, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny(generation.version), torch.float32)[0].train()
    used: list[tuple[int, ...]] = []

    def observed(*tensors: torch.Tensor) -> bool:
        used.append(tuple(tensors[0].shape))
        return loops_can_compute(*tensors)

    ids = torch.randint(20, 60, (2, 17), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients(fit: Callable[..., bool]) -> dict[str, torch.Tensor]:
        for module in (layer_loops, linear_attention):
            monkeypatch.setattr(module, "loops_can_compute", fit)
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }

    found = loss_and_gradients(observed)
    expected = loss_and_gradients(lambda *_: False)
    layers = len(model.get_decoder().layers)
    assert len(used) > 3 * layers  # two norms and a feed-forward layer in each
    largest = max(float(value.abs().max()) for value in expected.values())
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * largest)


def test_what_loops_cannot_compute_is_left_to_transformers() -> None:
    assert loops_fit(torch.zeros(2))
    assert not loops_fit(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not loops_fit(torch.zeros(2, device="meta"))
    half = torch.randn(3, 8).bfloat16()
    assert torch.equal(layer_loops._Gelu()(half), F.gelu(half, approximate="tanh"))


def test_few_rows_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of a loop takes longer than torch's operations."""
    monkeypatch.undo()
    assert not loops_fit(torch.zeros(1, 1024))
    assert loops_fit(torch.zeros(64, 1024))


def test_an_activation_that_models_share_stays_as_it_is(tiny_46: Path) -> None:
    model = load_model(tiny_46, torch.float32)[0]
    assert type(model.model.vision_tower.vit_merger.act) is layer_loops._Gelu
    assert type(activations.gelu_pytorch_tanh) is activations.GELUTanh


def test_a_model_can_be_pickled_and_copied(tiny_46: Path) -> None:
    layer = load_model(tiny_46, torch.float32)[0].get_decoder().layers[0]
    states = torch.randn(2, 3, layer.hidden_size)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(other.input_layernorm) is type(layer.input_layernorm)
        assert torch.equal(other.mlp(other.input_layernorm(states)), layer.mlp(layer.input_layernorm(states)))
