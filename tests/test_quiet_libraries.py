"""What libraries would print on every start, though it concerns nobody."""

import logging
from importlib.util import find_spec
from pathlib import Path

import minicpmv_finetune  # noqa: F401


def test_bitsandbytes_does_not_recommend_kernels_for_a_cpu() -> None:
    name = "bitsandbytes.backends.cpu.ops"
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    spec = find_spec("bitsandbytes")
    assert spec
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "backends" / "cpu" / "ops.py").read_text()
    assert source.count("logger.") == source.count("Failed to load CPU gemm_4bit_forward") == 1
    assert "logger = logging.getLogger(__name__)" in source
