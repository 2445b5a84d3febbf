import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.fsdp import keep_present_classes
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import MINICPMV_4_6
from tests.minicpmv.partitioned_worker import batch

LORA = ["--use_lora", "true", "--tune_llm", "false", "--lora_r", "4"]


def _trained(checkpoint: Path, *flags: str) -> Any:
    model, generation = load_model(checkpoint, torch.float32)
    arguments = parse(["--output_dir", "out", "--data_path", "data", *flags])
    return make_trainable(model, generation, arguments)


def _trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_fine_tune_trains_everything(tiny_46: Path) -> None:
    trainable, total = count_parameters(_trained(tiny_46))
    assert trainable == total


def test_frozen_parts_are_frozen(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, "--tune_vision", "false", "--tune_llm", "false"))
    assert names
    assert all(name.startswith(MINICPMV_4_6.merger) for name in names)


def test_lora_trains_adapters_and_the_whole_modules(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, *LORA))
    assert any("lora_A" in name and "self_attn.q_proj" in name for name in names)
    assert any("lora_A" in name and "linear_attn.in_proj_qkv" in name for name in names)
    for module in (MINICPMV_4_6.embed_tokens, MINICPMV_4_6.merger, MINICPMV_4_6.vision_tower):
        assert any(f"{module}.modules_to_save" in name for name in names), module
    assert not any("o_proj" in name and "vision" not in name for name in names)


def test_tune_vision_false_freezes_the_vision_tower(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, *LORA, "--tune_vision", "false", "--lora_bias", "all"))
    assert not any(MINICPMV_4_6.vision_tower in name for name in names)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_on_the_vision_tower_are_trained(tiny_46: Path, bias: str) -> None:
    pattern = r".*(language_model|vision_tower).*\.self_attn\.q_proj"
    flags = [*LORA, "--tune_vision", "false", "--lora_bias", bias, "--lora_target_modules", pattern]
    model = _trained(tiny_46, *flags)
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert any(MINICPMV_4_6.vision_tower in name for name in adapters)
    trained = _trainable_names(model)
    assert adapters <= trained
    assert {name for name in trained if MINICPMV_4_6.vision_tower in name} <= adapters


def test_target_modules_accept_the_published_name_of_the_language_model(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, *LORA, "--lora_target_modules", r"llm\..*layers\.\d+\.mlp\.up_proj"))
    assert {name.split(".mlp.")[1].split(".")[0] for name in names if "lora_A" in name} == {"up_proj"}


def test_layers_to_transform_selects_layers(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, *LORA, "--lora_layers_to_transform", "1"))
    layers = {name.split(".layers.")[1].split(".")[0] for name in names if "lora_A" in name}
    assert layers == {"1"}


def test_rank_alpha_dropout_and_bias_reach_peft(tiny_46: Path) -> None:
    model = _trained(tiny_46, *LORA, "--lora_alpha", "12", "--lora_dropout", "0.3", "--lora_bias", "all")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 12, 0.3, "all")


def test_further_modules_are_trained_whole(tiny_46: Path) -> None:
    names = _trainable_names(_trained(tiny_46, *LORA, "--lora_modules_to_save", "lm_head"))
    assert any("lm_head.modules_to_save" in name for name in names)


def test_none_leaves_embeddings_and_merger_frozen(tiny_46: Path) -> None:
    alone = [*LORA, "--lora_modules_to_save", "none"]
    names = _trainable_names(_trained(tiny_46, *alone, "--tune_vision", "false"))
    assert names
    assert all(".lora_" in name for name in names)
    names = _trainable_names(_trained(tiny_46, *alone))
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in names if ".lora_" not in name} == {
        "vision_tower"
    }


@pytest.mark.parametrize("version", ["2.6", "4.6"])
@pytest.mark.parametrize("named", ["norm", "mlp", "none,mlp", "merger,layer_norm1", "layers.0,norm", "none,norm"])
def test_a_module_inside_one_that_is_trained_whole_is_trained_with_it(
    version: str, named: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    if version == "2.6":
        named = named.replace("merger", "resampler")
    trained = _trained(tiny(version), *LORA, "--lora_modules_to_save", named)
    wrapped = [name for name, module in trained.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert not [name for name in wrapped for other in wrapped if name.startswith(f"{other}.")]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += parameter.requires_grad * 0.1
    trained.save_pretrained(tmp_path)
    again: Any = load_with_adapter(tiny(version), tmp_path, torch.float32)
    expected = dict(trained.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in again.named_parameters())
    assert len(wrapped) > 1


@pytest.mark.parametrize("flags", [[], ["--tune_vision", "false"], ["--lora_modules_to_save", "none"]])
@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_an_expression_that_matches_everything_adapts_all_linear_layers(
    version: str, tiny: Callable[[str], Path], flags: list[str]
) -> None:
    plain, generation = load_model(tiny(version), torch.float32)
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    model = _trained(tiny(version), *LORA, "--lora_target_modules", ".*", *flags)
    trained = {name.removeprefix("base_model.model.") for name in _trainable_names(model)}
    assert {name.split(".lora_A")[0] for name in trained if ".lora_A" in name} == linear
    embeddings = {f"{generation.embed_tokens}.modules_to_save.default.weight"}
    assert {name for name in trained if ".lora_" not in name} == (set() if "none" in flags else embeddings)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--llm_type", "minicpm"], "contradicts the checkpoint: MiniCPM-V 4.6 uses qwen"),
        ([*LORA, "--lora_target_modules", "nothing"], "matches no linear layer"),
        ([*LORA, "--lora_target_modules", "("], "is no regular expression"),
        ([*LORA, "--lora_layers_to_transform", "99"], "layers .99. contain no target"),
        (
            [*LORA, "--lora_layers_to_transform", "0", "--lora_layers_pattern", "blocks"],
            "no target's name has a number",
        ),
        ([*LORA, "--lora_layers_to_transform", "first"], "give layer numbers"),
        ([*LORA, "--lora_layer_replication", "0:2,1:3"], "mixes linear and full attention"),
        ([*LORA, "--lora_bias", "some"], "lora_bias: some is not accepted"),
        ([*LORA, "--lora_modules_to_save", "no_such"], "the model has no such module"),
        ([*LORA, "--lora_modules_to_save", "layers"], "matches only layers that are trained whole"),
        ([*LORA, "--lora_modules_to_save", "rotary_emb"], "has no parameters that could be trained"),
        ([*LORA, "--lora_modules_to_save", "language_model"], "trained whole.*lora_modules_to_save"),
        ([*LORA, "--lora_modules_to_save", "post_layernorm", "--tune_vision", "false"], "--tune_vision false freezes"),
        ([*LORA, "--lora_target_modules", ".*", "--tune_vision", "true"], "give --tune_vision false to train its adap"),
        ([*LORA, "--lora_target_modules", ".*", "--lora_modules_to_save", "merger"], "leave it out of --lora_modules"),
        ([*LORA, "--lora_target_modules", ".*", "--lora_modules_to_save", "0.mlp"], "trains .*0.mlp whole"),
        ([*LORA, "--lora_targets", "merger", "--lora_modules_to_save", "linear_1"], "trains .*linear_1 whole"),
        ([*LORA, "--lora_modules_to_save", "model.vision_tower", "--tune_vision", "false"], "vision false freezes"),
        ([*LORA, "--lora_modules_to_save", "model.vision_tower", "--lora_targets", "vision"], "which has adapters"),
        ([*LORA, "--lora_weight_path", "nowhere"], "an adapter folder"),
    ],
)
def test_mistakes_are_one_sentence(tiny_46: Path, flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        _trained(tiny_46, *flags)
    assert "\n" not in str(error.value)


def test_every_lora_argument_takes_effect_on_2_6(tiny: Callable[[str], Path]) -> None:
    checkpoint = tiny("2.6")
    biased = _trainable_names(_trained(checkpoint, *LORA, "--lora_bias", "all"))
    assert any(name.endswith("q_proj.base_layer.bias") for name in biased)
    stacked = _trained(checkpoint, *LORA, "--lora_layer_replication", "0:2,1:2")
    assert stacked.config.get_text_config().num_hidden_layers == 3
    first = ["--lora_layers_to_transform", "0", "--lora_layers_pattern", "layers"]
    narrowed = _trainable_names(_trained(checkpoint, *LORA, *first))
    assert {name.split(".layers.")[1].split(".")[0] for name in narrowed if "lora_A" in name} == {"0"}
    with pytest.raises(UserError, match="llm_type minicpm contradicts"):
        _trained(checkpoint, "--llm_type", "minicpm")


Case = tuple[str, dict[str, Any], str]
FEWER_LAYERS: dict[str, Any] = {"drop_vision_last_layer": True}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
FINE: dict[str, Any] = {"downsample_mode": "4x"}
ADAPTERS = [*LORA, "--tune_vision", "false", "--lora_bias", "all"]
KINDS = {
    "full": [],
    "whole modules": LORA,
    "parts": [*ADAPTERS, "--lora_targets", "llm,resampler,vision"],
    "everything": [*ADAPTERS, "--lora_target_modules", "(?!.*lm_head).*", "--lora_modules_to_save", "lm_head"],
    "dora": [*ADAPTERS, "--lora_target_modules", ".*", "--use_dora", "true", "--lora_modules_to_save", "none"],
}
SOME: list[Case] = [
    ("2.6", FEWER_LAYERS, "full"),
    *(("4.6", FINE, kind) for kind in ("full", "whole modules", "parts")),
]
OTHERS: list[Case] = [
    (version, changes, kind)
    for version in ("2.6", "4.0", "4.5", "4.6", "4.7")
    for changes in ({}, TIED, FINE if version in ("4.6", "4.7") else FEWER_LAYERS)
    for kind in KINDS
    if (version, changes, kind) not in SOME
]


def _named(case: Case, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(*case, id=" ".join((case[0], *case[1], case[2])), marks=marks)


@pytest.mark.parametrize(
    ("version", "changes", "kind"),
    [*map(_named, SOME), *(_named(case, pytest.mark.faults_only) for case in OTHERS)],
)
def test_every_trained_parameter_gets_a_gradient(
    version: str, changes: Mapping[str, Any], kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    # DDP waits for each of them, also in a process whose batch has no image.
    checkpoint = _changed(tiny(version), tmp_path / "checkpoint", changes)
    encoder, model = Encoder.from_checkpoint(checkpoint), _trained(checkpoint, *KINDS[kind]).train()
    trained = _trainable_names(model)
    for shows_image in (True, False):
        model.zero_grad()
        model(**batch(encoder, shows_image), use_cache=False, loss_only=True).loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def _changed(checkpoint: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of a checkpoint with another configuration, without the weights that this one has no place for."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    if changes == TIED and "text_config" in config:
        config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    if changes == FINE:
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["image_processor"] |= changes
        (folder / "processor_config.json").write_text(json.dumps(settings))
    dropped = "lm_head.weight" if changes == TIED else ".encoder.layers.2." if changes == FEWER_LAYERS else ""
    if dropped:
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if dropped not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("version", ["2.6", "4.6", "4.7"])
def test_fsdp_divides_the_model_into_classes_that_it_contains(version: str, tiny: Callable[[str], Path]) -> None:
    model, _ = load_model(tiny(version), torch.float32)
    keep_present_classes(model)
    names = {type(module).__name__ for module in model.modules()}
    wrapped = model._no_split_modules
    assert wrapped is not None
    assert set(wrapped) <= names
    assert any("DecoderLayer" in name for name in wrapped)
    assert any("EncoderLayer" in name for name in wrapped)
