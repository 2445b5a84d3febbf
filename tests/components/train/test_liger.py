"""liger-kernel is handed the language model inside, or the flag is refused; its kernels need a GPU to run."""

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


def _language_model(kind: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind))


def test_without_a_gpu_or_the_package_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="run on a GPU"):
        use_liger(_language_model("qwen2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        use_liger(_language_model("qwen2"))


@pytest.mark.parametrize("version", ["2.6", "4.5", "4.6", "4.7"])
def test_the_language_model_inside_is_handed_over(
    version: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, Callable[..., None]] = {}
    given: list[tuple[str, Any, dict[str, bool]]] = []
    for kind in ("qwen2", "qwen3", "qwen3_5_text"):
        known[kind] = lambda model, kind=kind, **options: given.append((kind, model, options))
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = known  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)

    model, generation = load_model(tiny(version), torch.float32)
    inside = model.get_submodule(generation.language_model)
    use_liger(inside)
    ((kind, handed, options),) = given
    assert handed is inside
    assert kind == inside.config.model_type
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with pytest.raises(UserError, match="does not know language models of type mamba"):
        use_liger(_language_model("mamba"))
