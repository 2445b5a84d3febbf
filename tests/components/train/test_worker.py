"""What a training process does before it imports anything large, and when it cannot."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from minicpmv_finetune.components.train.worker import import_deepspeed, leave_out_unused
from minicpmv_finetune.components.train.worker_exit import CAUSE_FILE, EXIT_CODE_FILE


@pytest.mark.parametrize(
    ("flags", "config", "is_left_out"),
    [
        ("", {}, True),
        ("--q_lora true", {}, False),
        ("--q-lora", {}, False),
        ("--optim adamw_torch_fused", {}, True),
        ("--optim paged_adamw_8bit", {}, False),
        ("--optim=adamw_bnb_8bit", {}, False),
        ("", {"quantization_config": {"load_in_4bit": True}}, False),
        ("", None, False),
    ],
)
def test_bitsandbytes_is_imported_only_where_it_is_needed(
    flags: str, config: dict[str, object] | None, is_left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sys.modules.pop("bitsandbytes", None)
    leave_out_unused(["--model_name_or_path", str(tmp_path), "--data_path", "d", *flags.split()])
    assert ("bitsandbytes" in sys.modules) == is_left_out


def test_deepspeed_compiles_no_collective_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
    monkeypatch.setitem(sys.modules, "deepspeed.ops", operations)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    import_deepspeed()
    assert operations.__compatible_ops__ == {"deepspeed_shm_comm": False}
    assert "mlflow" not in sys.modules


@pytest.mark.parametrize(
    ("flags", "variable", "is_left_out"),
    [
        ("", "", True),
        ("--strategy ddp", "false", True),
        ("--strategy fsdp2", "", True),
        ("--strategy zero2 --fsdp full_shard", "", True),
        ("--strategy zero2", "", False),
        ("--strategy=zero3", "", False),
        ("--deepspeed mine.json", "", False),
        ("", "true", False),
    ],
)
def test_deepspeed_is_imported_only_where_it_is_needed(
    flags: str, variable: str, is_left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", variable)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sys.modules.pop("deepspeed", None)
    leave_out_unused(["--data_path", "d", *flags.split()])
    assert (find_spec("deepspeed") is None) == is_left_out


def test_a_process_whose_import_fails_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPMV_FINETUNE_WORKER_EXIT_FOLDER", str(tmp_path))
    monkeypatch.setitem(sys.modules, "minicpmv_finetune.components.train.finetune", None)
    monkeypatch.delitem(sys.modules, "minicpmv_finetune.components.train.worker")  # so that it is imported again
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # which it leaves out
    monkeypatch.setattr(sys, "argv", ["worker"])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # this process keeps its own
    with pytest.raises(ImportError):
        runpy.run_module("minicpmv_finetune.components.train.worker", run_name="__main__")
    assert (tmp_path / EXIT_CODE_FILE).read_text() == "1"
    assert (tmp_path / CAUSE_FILE).read_text().startswith("ModuleNotFoundError: import of minicpmv_finetune")
