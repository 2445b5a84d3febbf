"""Base models, adapters and shards for the tests of the merge step."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.minicpmv.checkpoint import load_model
from tests.warm_processes import warm_processes

RECORD = {
    "base_model": "the base",
    "generation": "4.6",
    "data_fingerprint": "0123abcd",
    "max_slice_nums": 4,
    "use_lora": True,
    "parameters": {"trainable": 1, "total": 2},
    "metrics": {},
    "arguments": {"lora_r": 4, "learning_rate": 0.001},
    "history": [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 0.25}],
}
QUERIES = r"model\.language_model\..*self_attn\.(q_proj|v_proj)"


@pytest.fixture
def warm() -> Iterator[None]:
    """Start parity checks with the libraries imported."""
    with warm_processes():
        yield


@dataclass(frozen=True)
class Trained:
    """An adapter folder and the PEFT model that it was saved from."""

    folder: Path
    model: PeftModel


@pytest.fixture
def train(tmp_path: Path, write_record: Callable[..., None]) -> Callable[..., Trained]:
    """Creates an adapter whose tensors all differ from their initial values, as after a training."""

    def make(base: Path, **settings: Any) -> Trained:
        torch.manual_seed(0)
        model, _ = load_model(base, torch.float32)
        options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": QUERIES, **settings}
        adapted = get_peft_model(model, LoraConfig(**options))
        assert isinstance(adapted, PeftModel)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(str(tmp_path / "adapter"))
        write_record(tmp_path / "adapter")
        return Trained(tmp_path / "adapter", adapted)

    return make


@pytest.fixture(scope="session")
def write_record() -> Callable[..., None]:
    """Writes the record of a training."""

    def write(folder: Path, **changes: Any) -> None:
        (folder / "training.json").write_text(json.dumps(RECORD | changes))

    return write


@pytest.fixture(scope="session")
def copy_base() -> Callable[..., Path]:
    """Copies a base with other tensors or settings; each setting is also changed in the language model's section."""

    def copy(
        base: Path,
        folder: Path,
        tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors,
        **config: Any,
    ) -> Path:
        shutil.copytree(base, folder)
        save_file(tensors(load_file(base / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        document = json.loads((folder / "config.json").read_text())
        for name, value in config.items():
            document[name] = value
            document["text_config"][name] = value
        (folder / "config.json").write_text(json.dumps(document))
        return folder

    return copy


@pytest.fixture(scope="session")
def tied_46(tiny_46: Path, copy_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head shares the embeddings' weights, as in small published models."""

    def tie(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    return copy_base(tiny_46, tmp_path_factory.mktemp("base") / "tied", tie, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def bf16_46(tiny_46: Path, copy_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base stored in 16 bits."""

    def halve(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    return copy_base(tiny_46, tmp_path_factory.mktemp("base") / "bf16", halve, dtype="bfloat16")


@pytest.fixture(scope="session")
def shards(tiny_46: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few digits."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "eval"):
        samples = json.loads((digits / f"{split}.json").read_text())[:4]
        for sample in samples:
            sample["image"] = str(digits / sample["image"])
        (folder / f"{split}.json").write_text(json.dumps(samples))
    train_data, eval_data = (str(folder / f"{split}.json") for split in ("train", "eval"))
    validate_data(train_data, eval_data, folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    preprocess(folder / "dataset", str(tiny_46), folder / "shards", folder / "too-long.jsonl", PreprocessSettings())
    return folder / "shards"
