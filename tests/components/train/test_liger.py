"""liger-kernel is applied to the language model inside, or the flag is refused; its kernels need a GPU."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from minicpmv_finetune.components.train.liger import use_liger
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import load_model


def _language_model(model_type: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


def test_without_a_gpu_or_the_package_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="run on a GPU"):
        use_liger(_language_model("qwen2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        use_liger(_language_model("qwen2"))


@pytest.mark.parametrize("version", ["2.6", "4.5", "4.6", "4.7"])
def test_the_language_model_inside_gets_the_kernels(
    version: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    supported: dict[str, Callable[..., None]] = {}
    calls: list[tuple[str, Any, dict[str, bool]]] = []
    for model_type in ("qwen2", "qwen3", "qwen3_5_text"):
        supported[model_type] = lambda model, name=model_type, **options: calls.append((name, model, options))
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = supported  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)

    model, generation = load_model(tiny(version), torch.float32)
    inside = model.get_submodule(generation.language_model)
    use_liger(inside)
    ((name, patched, options),) = calls
    assert patched is inside
    assert name == inside.config.model_type
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with pytest.raises(UserError, match="does not support language models of type mamba"):
        use_liger(_language_model("mamba"))
