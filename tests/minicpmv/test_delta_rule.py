"""The gated delta rule compared with its definition."""

import pytest
import torch
from torch import nn

from minicpmv_finetune.minicpmv import delta_rule
from minicpmv_finetune.minicpmv.delta_rule import gated_delta_rule, read_states
from minicpmv_finetune.minicpmv.delta_rule_loop import delta_rule_loop_fits


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


@pytest.fixture(params=["loops", "chunks"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which the rule is computed: by a CPU's compiled loops, or by matrix products."""
    if request.param == "chunks":
        monkeypatch.setattr(delta_rule, "delta_rule_loop_fits", lambda keys, values: False)
    return str(request.param)


@pytest.mark.parametrize(("length", "width", "values"), [(1, 16, 16), (16, 16, 8), (75, 16, 24), (130, 80, 16)])
def test_the_result_equals_the_rule_applied_token_by_token(length: int, width: int, values: int, threads: int) -> None:
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


def test_states_alone_have_gradients() -> None:
    arguments = [torch.randn(2, 20, 2, 16) for _ in range(3)] + [-torch.rand(2, 20, 2), torch.rand(2, 20, 2)]
    leaves = [argument.double().requires_grad_() for argument in arguments]
    state = torch.zeros(2, 2, 16, 16, dtype=torch.float64)
    for k, v, g, b in zip(*(part.unbind(1) for part in leaves[1:]), strict=True):
        state = state * g.exp()[..., None, None]
        state = state + k[..., None] * (b[..., None] * (v - torch.einsum("rhkv,rhk->rhv", state, k))).unsqueeze(-2)
    weights = torch.randn_like(state)
    expected = torch.autograd.grad((state * weights).sum(), leaves[1:])
    _, last = read_states(*leaves)
    found = torch.autograd.grad((last * weights).sum(), leaves[1:])
    torch.testing.assert_close(last.double(), state, rtol=1e-4, atol=1e-4)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("width", "device"), [(129, "cpu"), (16, "meta")])
def test_wide_heads_and_other_devices_take_matrix_products(width: int, device: str) -> None:
    keys = torch.zeros(1, 1, 1, width, device=device)
    assert not delta_rule_loop_fits(keys, keys)
    assert delta_rule_loop_fits(torch.zeros(1, 1, 1, 128), torch.zeros(1, 1, 1, 128))
