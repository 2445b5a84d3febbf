"""QLoRA on a CPU; its speed and memory need a GPU and are not tested here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from minicpmv_finetune.components.merge.merge import MergeSettings, merge
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.train.quantized import four_bit_options, prepare_four_bit
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.inputs.checks import _check_kind
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.reports.training_record import read_record

QLORA = "--use_lora true --tune_llm false --q_lora true --lora_r 4 --learning_rate 3e-3 --save_strategy no"


def test_the_language_model_is_in_four_bits_and_the_vision_side_is_not(tiny_46: Path) -> None:
    generation = detect_generation(tiny_46)
    training = parse(["--output_dir", "out", "--data_path", "data", *QLORA.split()]).training
    model, _ = load_model(tiny_46, torch.float32, **four_bit_options(generation, training))
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert any(name.startswith(f"{generation.language_model}.layers.") for name in quantized)
    assert not any(name.startswith((generation.vision_tower, generation.merger, "lm_head")) for name in quantized)
    (first, *_) = (module for module in model.modules() if isinstance(module, Linear4bit))
    weight: Any = first.weight
    assert weight.quant_type == "nf4"
    assert weight.quant_state.nested
    plain, _ = load_model(tiny_46, torch.float32)
    assert count_parameters(model)[1] == count_parameters(plain)[1]


@pytest.mark.parametrize(("named", "is_trained"), [("", False), ("embed_tokens", True)])
def test_nothing_is_widened_and_embeddings_are_trained_on_request(tiny_46: Path, named: str, is_trained: bool) -> None:
    generation = detect_generation(tiny_46)
    flags = [*QLORA.split(), "--bf16", "true", "--use_cpu", "true", "--lora_modules_to_save", named]
    arguments = parse(["--output_dir", "out", "--data_path", "data", *flags])
    model, _ = load_model(tiny_46, torch.bfloat16, **four_bit_options(generation, arguments.training))
    prepare_four_bit(model, arguments.training)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = make_trainable(model, generation, arguments)
    whole = {name.split(".modules_to_save")[0] for name, _ in trained.named_parameters() if "modules_to_save" in name}
    assert any(generation.merger in name for name in whole)
    assert any(generation.embed_tokens in name for name in whole) == is_trained


def test_an_adapter_trains_on_four_bits_and_merges_into_the_full_precision_base(
    tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    paths = ["--model_name_or_path", str(tiny_46), "--data_path", str(shards), "--output_dir", str(tmp_path / "out")]
    launch([*paths, *QLORA.split(), "--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "16"])
    losses = [entry["loss"] for entry in read_record(tmp_path / "out").history if "loss" in entry]
    assert losses[-1] < losses[0]
    report = merge(
        str(tiny_46), tmp_path / "out", shards, tmp_path / "model", tmp_path / "report.json", MergeSettings()
    )
    assert report.parity_check is not None
    assert report.parity_check.failure is None


@pytest.mark.parametrize("strategy", ["zero3"])
def test_strategies_that_partition_weights_are_refused(strategy: str) -> None:
    with pytest.raises(UserError, match="use --strategy ddp or zero2"):
        parse(["--output_dir", "out", "--data_path", "data", *QLORA.split(), "--strategy", strategy])


def test_a_mixture_of_experts_is_refused_before_it_is_loaded(tiny_46: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_46 / "config.json").read_text())
    config["text_config"] |= {"num_experts": 256, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _check_kind(str(tmp_path), {"use_lora": True})
    with pytest.raises(UserError, match="256 experts a layer are one tensor, which cannot be loaded in 4 bits"):
        _check_kind(str(tmp_path), {"q_lora": True})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: each rank loads onto its own")
def test_each_rank_loads_onto_its_own_device(tiny_46: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    training = parse(["--output_dir", "out", "--data_path", "data", *QLORA.split()]).training
    model, _ = load_model(tiny_46, torch.bfloat16, **four_bit_options(detect_generation(tiny_46), training))
    assert {parameter.device.index for parameter in model.parameters()} == {0}
