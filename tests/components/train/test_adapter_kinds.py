"""The kinds of adapters beside plain LoRA: by part, DoRA, rsLoRA, LoRA+, PiSSA and LoRA-GA."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.components.merge.merge import MergeSettings, merge
from minicpmv_finetune.components.train.arguments import Arguments, parse
from minicpmv_finetune.components.train.initial_adapter import begin_adapters, begin_again
from minicpmv_finetune.components.train.launch import launch
from minicpmv_finetune.components.train.learning_rates import learning_rates, warn_of_tower
from minicpmv_finetune.components.train.print_plan import describe_training
from minicpmv_finetune.components.train.trainable import make_trainable
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import double_rank, load_with_adapter, save_adapter, subtract_first_values
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation

LORA = "--use_lora true --tune_llm false --lora_r 4 --use_cpu true"
ALONE = f"{LORA} --tune_vision false --lora_modules_to_save none --lora_dropout 0"
IDS = torch.arange(20, 37)[None]


def _parse(flags: str) -> Arguments:
    return parse(["--output_dir", "out", "--data_path", "data", *flags.split()], announce=lambda sentence: None)


def _make(checkpoint: Path, flags: str) -> Any:
    return make_trainable(*load_model(checkpoint, torch.float32), _parse(flags))


def _trained_parts(model: Any) -> dict[str, set[str]]:
    """The ways in which each part is trained."""
    ways: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(part for part in ("vision", "vpm", "resampler", "merger", "embed", "layers") if part in name)
            ways.setdefault(part, set()).add("adapters" if ".lora_" in name else "whole")
    return ways


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_named_part_has_adapters_and_is_not_trained_whole(version: str, tiny: Callable[[str], Path]) -> None:
    vision, merger = ("vpm", "resampler") if version == "2.6" else ("vision", "merger")
    found = _trained_parts(_make(tiny(version), f"{LORA} --lora_targets llm,resampler,vision"))
    assert found == {vision: {"adapters"}, merger: {"adapters"}, "embed": {"whole"}, "layers": {"adapters"}}
    found = _trained_parts(_make(tiny(version), f"{LORA} --lora_targets vision --lora_bias all"))
    assert {**found, "layers": set()} == {
        vision: {"adapters"},
        merger: {"whole"},
        "embed": {"whole"},
        "layers": set(),
    }
    found = _trained_parts(_make(tiny(version), f"{LORA} --lora_targets merger,llm --lora_layers_to_transform 1"))
    assert found == {vision: {"whole"}, merger: {"adapters"}, "embed": {"whole"}, "layers": {"adapters"}}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (f"{LORA} --lora_targets llm,vit", "lora_targets vit: no such part"),
        (f"{LORA} --lora_targets vision --tune_vision true", "trains the vision tower whole"),
        (f"{LORA} --lora_targets vision --lora_layers_to_transform 1", "does not name llm"),
        (f"{LORA} --lora_targets vision --lora_target_modules .*mlp.*", "does not name llm"),
        ("--tune_llm false --lora_targets llm", "--lora_targets: no adapter is trained"),
        ("--tune_llm false --use_dora true", "--use_dora: no adapter is trained"),
        ("--tune_llm false --lora_layer_replication 0:2,1:3", "--lora_layer_replication: no adapter is trained"),
        (f"{LORA} --init_lora_weights pizza", "give true, pissa"),
        (f"{LORA} --init_lora_weights pissa --strategy zero3", "needs whole weights"),
        (f"{LORA} --init_lora_weights lora_ga --q_lora true", "4-bit weights cannot follow"),
        (f"{LORA} --init_lora_weights pissa --lora_layer_replication 0:2,1:3", "replicated layers share"),
        (f"{LORA} --init_lora_weights pissa --lora_weight_path nowhere", "has begun already"),
        (f"{LORA} --use_dora true --q_lora true --strategy zero2", "use --strategy ddp"),
        (f"{LORA} --loraplus_lr_ratio 0.5", "give at least 1"),
    ],
)
def test_flags_that_contradict_each_other_are_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        _parse(flags)
    assert "\n" not in str(error.value)


def test_true_in_capitals_is_the_usual_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicpmv_finetune.components.train.arguments._shards_parameters", lambda training: True)
    assert _parse(f"{LORA} --init_lora_weights True").lora.init_lora_weights == "true"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (f"{LORA} --lora_targets resampler --lora_modules_to_save merger", "trains model.merger whole"),
        (f"{LORA} --lora_targets vision --lora_modules_to_save vision_tower", "has adapters"),
        (f"{LORA} --init_lora_weights lora_ga --lora_r 64", "needs 128 singular values of each layer"),
        (f"{ALONE} --vision_lr 1e-6", "--vision_lr: nothing in model.vision_tower is trained"),
        (f"{ALONE} --embedding_lr 1e-6", "--embedding_lr: nothing in"),
    ],
)
def test_flags_that_contradict_the_model_are_one_sentence(flags: str, sentence: str, tiny_46: Path) -> None:
    arguments = _parse(flags)
    with pytest.raises(UserError, match=sentence) as error:
        learning_rates(_make(tiny_46, flags), detect_generation(tiny_46), arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", ["", "--loraplus_lr_ratio 4 --weight_decay 0.1"])
def test_each_part_has_its_learning_rate(
    more: str, tiny_46: Path, make_trainer: Callable[..., MiniCPMVTrainer]
) -> None:
    flags = f"{LORA} --learning_rate 1e-3 --vision_lr 1e-6 --resampler_lr 1e-5 --embedding_lr 1e-4 {more}"
    arguments, model = _parse(flags), _make(tiny_46, flags)
    trainer = make_trainer(model, learning_rate=1e-3, weight_decay=arguments.training.weight_decay)
    trainer._rates = learning_rates(model, detect_generation(tiny_46), arguments)
    optimizer = trainer.create_optimizer()
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    ratio = 4 if more else 1
    expected = {"vision_tower": 1e-6, "merger": 1e-5, "embed_tokens": 1e-4, "lora_A": 1e-3, "lora_B": 1e-3 * ratio}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(rates) == len(trained)
    for name, weight in trained.items():
        part = next(part for part in expected if f".{part}." in name)
        assert rates[id(weight)] == pytest.approx(expected[part]), name
    assert optimizer.param_groups[0]["lr"] == 1e-3  # which the Trainer logs
    assert not more or any(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_a_tower_at_the_adapters_rate_is_warned_of(tiny_46: Path) -> None:
    generation = detect_generation(tiny_46)
    for flags, is_warned in (
        (LORA, True),
        (f"{LORA} --vision_lr 1e-6", False),
        (f"{LORA} --lora_targets llm,vision", False),
        ("--use_cpu true", False),
    ):
        assert bool(warn_of_tower(_make(tiny_46, flags), generation, _parse(flags))) == is_warned, flags


def test_the_plan_shows_rates_and_the_kind_of_adapters(tiny_46: Path) -> None:
    flags = f"{LORA} --model_name_or_path {tiny_46} --vision_lr 1e-6 --loraplus_lr_ratio 4 --learning_rate 1e-3"
    parts, saved = describe_training(_parse(f"{flags} --use_dora true --init_lora_weights pissa"))
    assert {part.name: part.rates for part in parts if part.rates} == {
        "vision tower": "1e-06",
        "resampler / merger": "0.001",
        "embeddings": "0.001",
        "language model": "0.001, 0.004",
    }
    assert saved.endswith("(DoRA, begun as pissa, of rank 8 for the unchanged base model)")


def _logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def _gradients_of(model: Any) -> Callable[[], None]:
    def compute() -> None:
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()

    return compute


@pytest.mark.parametrize(
    "more",
    ["--init_lora_weights pissa", "--init_lora_weights pissa_niter_4 --use_dora true", "--init_lora_weights lora_ga"],
)
@pytest.mark.parametrize("alpha", ["6 --use_rslora true", pytest.param("8", marks=pytest.mark.faults_only)])
def test_adapters_that_change_the_base_are_saved_for_the_unchanged_one(
    more: str, alpha: str, tiny_46: Path, tmp_path: Path
) -> None:
    flags = f"{ALONE} {more} --lora_alpha {alpha}"
    model, lora = _make(tiny_46, flags), _parse(flags).lora
    before, weights = _logits(model), {name: value.clone() for name, value in model.named_parameters()}
    initial = begin_adapters(model, lora, 0, _gradients_of(model))
    torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-3)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, weights[name])}
    assert {name.split(".")[-2] for name in changed} == {"base_layer", "default"}
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if "base_layer" in name)
    again = _make(tiny_46, flags)
    begin_again(again, initial)
    bases = {name: value for name, value in model.named_parameters() if ".base_layer." in name}
    assert all(torch.equal(value, bases[name]) for name, value in again.named_parameters() if name in bases)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight) * weight.requires_grad
    save_adapter(model, model.state_dict(), tmp_path, str(tiny_46))
    subtract_first_values(model, initial, tmp_path / "adapter_model.safetensors")
    double_rank(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert {value.shape[0] for name, value in _weights(tmp_path).items() if "lora_A" in name} == {8}
    torch.testing.assert_close(
        _logits(load_with_adapter(tiny_46, tmp_path, torch.float32)), _logits(model), rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(_logits(model), before, atol=1e-2)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


TRAINING = f"{LORA} --learning_rate 1e-3 --per_device_train_batch_size 16 --max_steps 4 --save_strategy no"


def _merge(base: Path, adapter: Path, shards: Path, folder: Path) -> None:
    report = merge(str(base), adapter, shards, folder / "model", folder / "report.json", MergeSettings(parity_rows=2))
    assert report.parity_check is not None
    assert report.parity_check.failure is None


def test_every_kind_trains_and_merges(
    tiny_46: Path, shards: Path, train: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds = "--lora_targets llm,resampler,vision --use_dora true --use_rslora true --loraplus_lr_ratio 4"
    trained = train(shards, f"{TRAINING} {kinds} --vision_lr 1e-4 --neftune_noise_alpha 5")
    assert trained.losses[-1] < trained.losses[0]
    assert "--fused_lora: PEFT computes the adapters itself, because of DoRA" in capfd.readouterr().err
    weights = _weights(trained.folder)
    assert {name.split(".lora_")[0].split(".")[3] for name in weights if ".lora_B" in name} >= {
        "vision_tower",
        "merger",
        "language_model",
    }
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
    _merge(tiny_46, trained.folder, shards, tmp_path)
    answers = [
        predict(str(model), [], "Which digit?", str(adapter), 4, False)
        for model, adapter in ((tiny_46, trained.folder), (tmp_path / "model", ""))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["lora_ga", pytest.param("pissa", marks=pytest.mark.faults_only)])
def test_a_training_that_changes_the_base_continues_with_the_same_bits_and_merges(
    kind: str, tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    flags = (
        f"--model_name_or_path {tiny_46} --data_path {shards} {TRAINING} --init_lora_weights {kind} --save_strategy "
        f"steps --save_steps 2 --save_total_limit 2 --checkpoint_uri {tmp_path / 'kept'} --logging_steps 1"
    ).split()
    launch([*flags, "--output_dir", str(tmp_path / "one")])
    checkpoint = tmp_path / "kept" / "checkpoint-2"
    launch([*flags, "--output_dir", str(tmp_path / "two"), "--resume_from_checkpoint", str(checkpoint)])
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # The adapter of a checkpoint that is kept in the result is for the unchanged base too.
    for adapter in (tmp_path / "one", tmp_path / "one" / "checkpoint-2"):
        assert {value.shape[0] for name, value in _weights(adapter).items() if "lora_A" in name} == {8}
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config.get("init_lora_weights", True)) == (8, 128, True)
    _merge(tiny_46, tmp_path / "one" / "checkpoint-2", shards, tmp_path)
    _merge(tiny_46, tmp_path / "one", shards, tmp_path / "last")


def test_noise_is_added_to_embeddings_in_training_only(
    tiny_46: Path, make_trainer: Callable[..., MiniCPMVTrainer]
) -> None:
    model = _make(tiny_46, f"{LORA} --lora_dropout 0")
    trainer = make_trainer(model, neftune_noise_alpha=5.0)
    embed = model.get_input_embeddings()
    plain = embed(IDS)
    handle = activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)
    noise = model.train().get_input_embeddings()(IDS) - plain
    assert noise.abs().max() <= 5 / (IDS.shape[1] * plain.shape[2]) ** 0.5
    assert noise.any()
    assert torch.equal(model.eval().get_input_embeddings()(IDS), plain)
    deactivate_neftune(trainer.model, handle, trainer.accelerator)
    assert torch.equal(model.train().get_input_embeddings()(IDS), plain)
