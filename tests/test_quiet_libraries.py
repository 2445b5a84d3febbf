"""What libraries would print on every start, though it concerns nobody."""

import importlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

import minicpmv_finetune
from minicpmv_finetune import attempts


def test_bitsandbytes_does_not_recommend_kernels_for_a_cpu() -> None:
    name = "bitsandbytes.backends.cpu.ops"
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    spec = find_spec("bitsandbytes")
    assert spec
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "backends" / "cpu" / "ops.py").read_text()
    assert source.count("logger.") == source.count("Failed to load CPU gemm_4bit_forward") == 1
    assert "logger = logging.getLogger(__name__)" in source


def test_a_components_libraries_draw_no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    importlib.reload(attempts)
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_a_component_imports_the_setting_before_its_libraries() -> None:
    folder = Path(minicpmv_finetune.__file__).parent / "components"
    for path in folder.glob("*/component.py"):
        imports = [line.strip() for line in path.read_text().splitlines() if "from minicpmv_finetune" in line]
        own = [line for line in imports if line.startswith("from minicpmv_finetune.components")]
        if own:
            assert imports.index("from minicpmv_finetune.attempts import run_step") < imports.index(own[0]), path
