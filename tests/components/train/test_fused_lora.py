"""A layer that is computed with its adapter in one operation has the output and gradients of PEFT's layer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from minicpmv_finetune.components.train import fused_lora
from minicpmv_finetune.components.train.fused_lora import FusedLoraLinear, fuse_adapters
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import GENERATIONS, detect_generation


def _adapted(
    *, bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any
) -> PeftModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=bias), nn.SiLU(), nn.Linear(10, 6, bias=bias)).to(dtype)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules=["0", "2"],
        init_lora_weights=False,
        **options,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _output_and_gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    assert x.grad is not None
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"output": output.detach(), "input": x.grad, **gradients}


def _is_fused(model: nn.Module) -> bool:
    kinds = {type(module) for module in model.modules() if isinstance(module, LoraLinear)}
    return kinds == {FusedLoraLinear}


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_output_and_gradients_equal_those_of_peft(shape: tuple[int, ...], bias: bool, whole: bool) -> None:
    model, x = _adapted(bias=bias).train(), torch.randn(shape)
    model.requires_grad_(True) if whole else None
    plain = _output_and_gradients(model, x)
    fuse_adapters(model)
    assert _is_fused(model)
    fused = _output_and_gradients(model, x)
    assert plain.keys() == fused.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-5, msg=partial(_prefixed, name))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_no_rows_have_no_gradients(dropout: float) -> None:
    """The head computes none for a batch without supervised tokens."""
    model = _adapted(dropout=dropout).train()
    fuse_adapters(model)
    found = _output_and_gradients(model, torch.zeros(0, 12))
    assert found["output"].shape == (0, 6)
    assert found["input"].shape == (0, 12)
    assert all(not bool(value.any()) for value in found.values())


def _prefixed(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda one: one.version)
def test_whole_models_have_the_same_gradients(generation: Any, tiny: Callable[[str], Path]) -> None:
    folder = tiny(generation.version)
    model = load_model(folder, torch.float32)[0]
    torch.manual_seed(0)
    targets = rf".*{detect_generation(folder).language_model.replace('.', '[.]')}.*proj.*"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
    ids = torch.randint(20, 60, (2, 17))

    def loss_and_gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {
            name: value.grad.clone() for name, value in adapted.named_parameters() if value.grad is not None
        }

    plain = loss_and_gradients()
    fuse_adapters(adapted)
    assert _is_fused(adapted)
    fused = loss_and_gradients()
    largest = max(float(value.abs().max()) for value in plain.values())
    assert plain.keys() == fused.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("drawn_in_loops", [True, False])
def test_gradients_are_those_of_the_elements_that_dropout_kept(
    drawn_in_loops: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected values are PEFT's own, with its dropout replaced by the same elements."""
    model, x = _adapted(dropout=0.4).train(), torch.randn(3, 5, 12)
    model.requires_grad_(True) if whole else None
    draws: dict[torch.Size, Any] = {}

    def kept(x: torch.Tensor) -> Any:
        if x.shape not in draws:
            drawn, _ = draw(x, torch.float32, 0.4)
            draws[x.shape] = drawn if drawn_in_loops else fused_lora._keep(torch.ones(x.shape), drawn).bool()
        return draws[x.shape]

    draw = fused_lora._draw_dropout
    monkeypatch.setattr(fused_lora, "_draw_dropout", lambda x, _, rate: (kept(x), 1 / (1 - rate)))
    names = model.state_dict().keys()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    hooks = [
        dropout.register_forward_hook(
            lambda _, inputs, output: inputs[0] * fused_lora._keep(torch.ones(inputs[0].shape), kept(inputs[0])) / 0.6
        )
        for dropout in dropouts
    ]
    plain = _output_and_gradients(model, x)
    for hook in hooks:
        hook.remove()
    fuse_adapters(model)
    fused = _output_and_gradients(model, x)
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == names


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_dropout_drops_the_given_share_and_preserves_the_mean(
    rate: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(fused_lora, "compile_loop", lambda *_, **__: None)
    torch.manual_seed(0)
    x = torch.ones(1001, 999)
    drawn, factor = fused_lora._draw_dropout(x, torch.float32, rate)
    kept = fused_lora._keep(x, drawn)
    assert kept.shape == x.shape
    assert set(kept.unique().tolist()) <= {0, 1}
    assert float(kept.mean()) == pytest.approx(1 - rate, abs=0.002)
    assert float(kept.mean()) * factor == pytest.approx(0 if rate == 1 else 1, abs=0.003)
    # Neither neighbors nor what is drawn next are correlated, though all of it comes from two random numbers.
    next_kept = fused_lora._keep(x, fused_lora._draw_dropout(x, torch.float32, rate)[0])
    deviation, following = (1 - elements - rate for elements in (kept, next_kept))
    for one, other in ((deviation[:, 1:], deviation[:, :-1]), (deviation[1:], deviation[:-1]), (deviation, following)):
        assert float((one * other).mean()) == pytest.approx(0, abs=0.003)


def test_on_a_gpu_a_byte_per_element_is_stored() -> None:
    with FakeTensorMode():
        x = torch.empty(64, 12, dtype=torch.bfloat16, device="cuda")
        kept, factor = fused_lora._draw_dropout(x, torch.bfloat16, 0.2)
    assert isinstance(kept, torch.Tensor)
    assert (kept.device, kept.shape, kept.nbytes) == (x.device, x.shape, x.numel())
    assert factor == 1.25


def test_nothing_is_dropped_in_evaluation_and_a_seed_gives_the_same_mask() -> None:
    model, x = _adapted(dropout=0.5), torch.randn(4, 12)
    fuse_adapters(model)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(first, model(x))
    assert not torch.equal(first, model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_recomputed_step_drops_the_same_elements() -> None:
    model, x = _adapted(dropout=0.5).train(), torch.randn(4, 12)
    fuse_adapters(model)
    torch.manual_seed(1)
    plain = _output_and_gradients(model, x)
    torch.manual_seed(1)
    recomputed = _output_and_gradients(_Recomputed(model), x)
    assert torch.equal(plain["input"], recomputed["input"])


class _Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_mixed_precision_computes_as_peft_does() -> None:
    model, x = _adapted().train(), torch.randn(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        plain = _output_and_gradients(model, x)
    fuse_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused = _output_and_gradients(model, x)
    assert fused["output"].dtype == plain["output"].dtype == torch.bfloat16
    for name in plain:
        assert fused[name].dtype == plain[name].dtype, name
        largest = float(plain[name].abs().max())
        torch.testing.assert_close(fused[name], plain[name], rtol=0.05, atol=0.02 * largest)


def test_everything_beyond_plain_lora_is_computed_by_peft() -> None:
    dora = _adapted(use_dora=True)
    fuse_adapters(dora)
    assert not any(isinstance(module, FusedLoraLinear) for module in dora.modules())

    x = torch.randn(4, 12)
    plain, fused = _adapted().eval(), _adapted().eval()
    fuse_adapters(fused)
    changes: tuple[Callable[[Any], object], ...] = (
        lambda model: model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
        lambda model: model.base_model.set_adapter(["default", "second"]),
        lambda model: model.base_model.merge_adapter(["default"]),
        lambda model: model.base_model.unmerge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
    )
    for change in changes:
        for model in (plain, fused):
            torch.manual_seed(3)
            change(model)
        torch.testing.assert_close(fused(x), plain(x))


def test_adapters_of_another_type_than_the_model_are_computed_in_their_own_type() -> None:
    model, x = _adapted(dtype=torch.bfloat16), torch.randn(4, 12, dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        value.data = value.data.float() if "lora" in name else value.data
    plain = model(x)
    fuse_adapters(model)
    assert torch.equal(model(x), plain)
