"""Adapters that are damaged or do not fit are refused with one sentence, wherever they are loaded."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.trainable import check_continued_adapter, make_trainable
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_with_adapter, save_adapter
from minicpmv_finetune.minicpmv.checkpoint import fingerprint, load_model
from minicpmv_finetune.reports.training_record import RECORD_FILE
from tests.example_record import example_record

LORA = ["--use_lora", "true", "--tune_llm", "false", "--tune_vision", "false", "--lora_r", "4"]


def _continued(base: Path, adapter: Path, *flags: str) -> Any:
    paths = ["--model_name_or_path", str(base), "--data_path", "data", "--lora_weight_path", str(adapter)]
    arguments = parse([*paths, "--use_lora", "true", "--tune_llm", "false", *flags])
    check_continued_adapter(arguments, fingerprint(base))
    model, generation = load_model(base, torch.float32)
    return make_trainable(model, generation, arguments)


@pytest.fixture(scope="module")
def adapter(tiny_46: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model, generation = load_model(tiny_46, torch.float32)
    adapted: Any = make_trainable(model, generation, parse(["--data_path", "data", *LORA]))
    adapted.save_pretrained(folder)
    record = example_record(base_fingerprint=fingerprint(tiny_46))
    (folder / RECORD_FILE).write_text(record.model_dump_json())
    return folder


def _without_tensor(folder: Path, end: str) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors[next(name for name in tensors if end in name)]
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def _with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def _with_config(folder: Path, **fields: object) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: _truncate(folder / ADAPTER_WEIGHTS), "cannot be read.*the adapter is damaged"),
    "empty": (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b""), "cannot be read.*the adapter is damaged"),
    "no weights": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "no lora_A": (lambda folder: _without_tensor(folder, "lora_A"), "the file lacks base_model.*lora_A"),
    "no embeddings": (lambda folder: _without_tensor(folder, "embed_tokens"), "the file lacks base_model.*embed_tok"),
    "more tensors": (
        lambda folder: _with_tensors(folder, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)})),
        "the model has no place for base_model.model.x.lora_A.weight",
    ),
    "nan": (
        lambda folder: _with_tensors(folder, lambda t: next(iter(t.values())).fill_(float("nan"))),
        "contains NaN or infinity",
    ),
    "other rank": (lambda folder: _with_config(folder, r=8), "size mismatch for base_model"),
    "no targets": (lambda folder: _with_config(folder, target_modules=["nothing"]), "does not fit the base model"),
    "rank as text": (lambda folder: _with_config(folder, r="many"), "r: Input should be a valid integer"),
    "other method": (lambda folder: _with_config(folder, peft_type="LOHA"), "peft_type 'LOHA' is not supported"),
    "list": (lambda folder: (folder / ADAPTER_CONFIG).write_text("[1]"), "not valid JSON"),
    "half": (lambda folder: (folder / ADAPTER_CONFIG).write_text('{"r": '), "not valid JSON"),
    "no config": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "so this is not a PEFT adapter; give"),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_prediction_and_training(
    tiny_46: Path, adapter: Path, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change, sentence = DAMAGES[damage]
    change(folder)
    for load in (load_with_adapter, _continued):
        with pytest.raises(UserError, match=sentence) as error:
            load(tiny_46, folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)


def test_another_base_model_is_refused(
    tiny_46: Path, tiny: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    merged = Path(shutil.copytree(tiny_46, tmp_path / "merged"))
    weights = next(merged.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    for base in (merged, tiny("2.6")):
        with pytest.raises(UserError, match=r"not the weights that .* was trained on"):
            predict(str(base), [], "Which digit?", str(adapter), 1)
        with pytest.raises(UserError, match=r"not the weights that .* was trained on"):
            _continued(base, adapter)
    # An adapter that another program made has no record.
    plain = Path(shutil.copytree(adapter, tmp_path / "plain"))
    (plain / RECORD_FILE).unlink()
    with pytest.raises(UserError, match="does not fit the base model"):
        load_with_adapter(tiny("2.6"), plain)
    assert predict(str(tiny_46), [], "Which digit?", str(plain), 1) is not None


def test_peft_does_not_look_for_a_base_model_in_a_store(tiny_46: Path, adapter: Path, tmp_path: Path) -> None:
    model = _continued(tiny_46, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, model.state_dict(), tmp_path / "saved", "s3://models/base")
        (tmp_path / "saved" / RECORD_FILE).write_bytes((adapter / RECORD_FILE).read_bytes())
        continued = _continued(tiny_46, tmp_path / "saved")
    assert continued.peft_config["default"].base_model_name_or_path == "s3://models/base"
    saved, before = (json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in (tmp_path / "saved", adapter))
    assert saved == {**before, "base_model_name_or_path": "s3://models/base"}


def test_a_continued_adapter_keeps_its_settings(tiny_46: Path, adapter: Path) -> None:
    continued = _continued(tiny_46, adapter, "--lora_r", "4", "--tune_vision", "false")
    assert continued.peft_config["default"].r == 4
    assert any(parameter.requires_grad for parameter in continued.parameters())
    _continued(tiny_46, adapter)  # the published defaults are not the user's wish


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_r 64",
        "--lora_alpha 8",
        "--lora_dropout 0.5",
        "--lora_bias all",
        "--lora_target_modules .*q_proj",
        "--lora_modules_to_save none",
        "--lora_modules_to_save lm_head",
        "--lora_layers_to_transform 1",
        "--tune_vision true",
    ],
)
def test_a_flag_that_contradicts_the_continued_adapter_is_refused(tiny_46: Path, adapter: Path, flags: str) -> None:
    with pytest.raises(UserError, match=f"the adapter was trained with other .*{flags.split()[0]}"):
        _continued(tiny_46, adapter, *flags.split())
