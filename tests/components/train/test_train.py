import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minicpmv_finetune.components.errors import UserError
from minicpmv_finetune.components.minicpmv.checkpoint import load_model, load_with_adapter
from minicpmv_finetune.components.train.train import launch
from minicpmv_finetune.components.training_record import read_record

LORA = (
    "--use_lora true --tune_llm false --lora_r 4 --per_device_train_batch_size 16 --learning_rate 1e-3 "
    "--save_strategy no"
)


def _flags(base: Path, shards: Path, out: Path, more: str = LORA) -> list[str]:
    where = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(out)]
    return [*where, *more.split(), "--logging_steps", "1"]


@pytest.fixture(scope="session")
def adapter(tiny_46: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    launch(_flags(tiny_46, shards, out, f"{LORA} --num_train_epochs 2"))
    return out


def test_adapter_is_plain_peft_and_has_moved(tiny_46: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    load_with_adapter(tiny_46, adapter)


def test_record_tells_what_was_trained(tiny_46: Path, adapter: Path) -> None:
    record = read_record(adapter)
    assert record.base_model == str(tiny_46)
    assert record.use_lora
    assert 0 < record.parameters["trainable"] < record.parameters["total"]
    assert record.arguments["lora_r"] == 4
    losses = [figures["loss"] for figures in record.history if "loss" in figures]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_same_seed_trains_to_the_same_bits(tiny_46: Path, shards: Path, adapter: Path, tmp_path: Path) -> None:
    launch(_flags(tiny_46, shards, tmp_path / "again", f"{LORA} --num_train_epochs 2"))
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_continues_from_an_adapter(tiny_46: Path, shards: Path, adapter: Path, tmp_path: Path) -> None:
    launch(_flags(tiny_46, shards, tmp_path / "more", f"{LORA} --max_steps 1 --lora_weight_path {adapter}"))
    record = read_record(tmp_path / "more")
    started_at = next(figures["loss"] for figures in record.history if "loss" in figures)
    fresh = next(figures["loss"] for figures in read_record(adapter).history if "loss" in figures)
    assert started_at < fresh


def test_full_fine_tune_leaves_a_whole_checkpoint(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    launch(_flags(tiny_46, shards, tmp_path / "full", "--max_steps 2 --save_strategy no --learning_rate 1e-3"))
    tuned, _ = load_model(tmp_path / "full")
    base, _ = load_model(tiny_46)
    moved = [name for name, weight in tuned.state_dict().items() if not torch.equal(weight, base.state_dict()[name])]
    assert len(moved) > 100


def test_a_users_mistake_in_a_worker_is_one_sentence(tiny_46: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json here") as error:
        launch(_flags(tiny_46, tmp_path, tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mistake_ends_the_command_with_two_and_no_traceback(tiny_46: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minicpmv_finetune.components.train.finetune"]
    done = subprocess.run([*command, *_flags(tiny_46, tmp_path, tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_signal_ends_the_workers_too(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    flags = _flags(tiny_46, shards, tmp_path / "out", f"{LORA} --num_train_epochs 10000")
    code = f"from minicpmv_finetune.components.train.train import launch; launch({flags!r})"
    environment = {**os.environ, "MINICPMV_PROGRESS_SECONDS": "0"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stderr is not None
        for line in launcher.stderr:
            if line.startswith("train ") and "loss" in line:
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert children
        launcher.send_signal(signal.SIGTERM)
        launcher.stderr.read()
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_record_is_json(adapter: Path) -> None:
    assert json.loads((adapter / "training.json").read_text())["generation"] == "4.6"
