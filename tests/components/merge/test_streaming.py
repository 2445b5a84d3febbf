"""The merged weights equal those of PEFT's own merge; an adapter that cannot be merged is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import replicate_layers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minicpmv_finetune.components.merge.streaming import stream
from minicpmv_finetune.components.merge.tensor_layout import edit_config
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import copy_non_weight_files, load_model

Train = Callable[..., Any]
CopyBase = Callable[..., Path]
QUERIES = r"model\.language_model\..*self_attn\.(q_proj|v_proj)"
VISION_QUERIES = r"model\.vision_tower\.encoder\..*q_proj"
EMBEDDINGS = "model.language_model.embed_tokens"


def merge_streamed(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    stream(base, adapter, folder)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged_by_peft(model: PeftModel) -> dict[str, torch.Tensor]:
    return dict(model.merge_and_unload().state_dict())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="lora"),
        pytest.param({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.1\..*v_proj": 32}}, id="patterns"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"use_dora": True, "target_modules": ["embed_tokens"]}, id="dora of embeddings"),
        pytest.param({"lora_bias": True, "target_modules": VISION_QUERIES}, id="bias in the adapter"),
        pytest.param({"bias": "all", "target_modules": VISION_QUERIES, "modules_to_save": ["merger"]}, id="all biases"),
        pytest.param({"bias": "lora_only", "target_modules": VISION_QUERIES}, id="adapted layers' biases"),
        pytest.param({"modules_to_save": [EMBEDDINGS, "model.merger", "model.vision_tower"]}, id="modules to save"),
        pytest.param({"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, id="lora of embeddings"),
        pytest.param({"target_modules": r".*linear_attn\.in_proj_qkv"}, id="linear attention"),
    ],
)
def test_merged_weights_equal_those_of_merge_and_unload(
    tiny_46: Path, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trained = train(tiny_46, **settings)
    found = merge_streamed(tiny_46, trained.folder, tmp_path / "merged")
    assert_equal(found, merged_by_peft(trained.model))


def test_a_sharded_base_keeps_its_layout(tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path) -> None:
    base = copy_base(tiny_46, tmp_path / "sharded")
    (base / "model.safetensors").unlink()
    load_model(tiny_46)[0].save_pretrained(base, max_shard_size="1MB")
    trained = train(base, modules_to_save=["model.merger"])
    found = merge_streamed(base, trained.folder, tmp_path / "merged")
    assert_equal(found, merged_by_peft(trained.model))
    files = sorted(path.name for path in base.glob("*.safetensors*"))
    assert len(files) > 3
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == files
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "merged")
    )
    assert before == after


def test_the_weights_of_a_bf16_base_are_cast_once(bf16_46: Path, train: Train, tmp_path: Path) -> None:
    trained = train(bf16_46, use_dora=True, modules_to_save=["model.merger"])
    found = merge_streamed(bf16_46, trained.folder, tmp_path / "merged")
    for name, expected in merged_by_peft(trained.model).items():
        assert found[name].dtype == torch.bfloat16
        # Another order of summation rarely rounds to the other neighbor.
        unequal = found[name] != expected.bfloat16()
        assert unequal.float().mean() < 1e-3, name


def test_unchanged_tensors_keep_every_byte(bf16_46: Path, train: Train, tmp_path: Path) -> None:
    trained = train(bf16_46)
    found = merge_streamed(bf16_46, trained.folder, tmp_path / "merged")
    before = load_file(bf16_46 / "model.safetensors")
    unequal = {name for name in before if not torch.equal(found[name], before[name])}
    assert {name.rsplit(".", 2)[-2] for name in unequal} == {"q_proj", "v_proj"}
    for folder in (bf16_46, tmp_path / "merged"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("settings", [{"modules_to_save": [EMBEDDINGS]}, {"target_modules": ["embed_tokens"]}])
def test_tied_embeddings_that_were_trained_separately_become_two(
    tied_46: Path, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trained = train(tied_46, **settings)
    (tmp_path / "merged").mkdir()
    layout = stream(tied_46, trained.folder, tmp_path / "merged").layout
    copy_non_weight_files(tied_46, tmp_path / "merged")
    edit_config(tmp_path / "merged", layout)
    merged, _ = load_model(tmp_path / "merged")
    ids = torch.arange(40).unsqueeze(0)
    with torch.inference_mode():
        # PEFT merges the adapter into both uses of the tied tensor, although it trained only one.
        expected = trained.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    before = load_file(tied_46 / "model.safetensors")[f"{EMBEDDINGS}.weight"]
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert isinstance(head, torch.nn.Linear)
    assert isinstance(embeddings, torch.nn.Embedding)
    assert torch.equal(head.weight, before)
    assert not torch.equal(embeddings.weight, before)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_embeddings_that_were_trained_as_one_stay_one(
    tied_46: Path, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trained = train(tied_46, ensure_weight_tying=True, **settings)
    (tmp_path / "merged").mkdir()
    layout = stream(tied_46, trained.folder, tmp_path / "merged").layout
    assert not layout.untied
    assert load_file(tmp_path / "merged" / "model.safetensors").keys().isdisjoint({"lm_head.weight"})
    copy_non_weight_files(tied_46, tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    ids = torch.arange(40).unsqueeze(0)
    with torch.inference_mode():
        expected = trained.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_replicated_layers_are_written_out(tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path) -> None:
    def keep_full_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or "vision" in name}
        for number in range(3):
            prefix = "model.language_model.layers."
            layer = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}1.")}
            kept |= {
                name.replace(f"{prefix}1.", f"{prefix}{number}."): tensor * (1 + number / 10)
                for name, tensor in layer.items()
            }
        return kept

    base = copy_base(tiny_46, tmp_path / "uniform", keep_full_attention)
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (base / "config.json").write_text(json.dumps(config))

    stacked, _ = load_model(base, torch.float32)
    replicate_layers(stacked.model.language_model, [(0, 2), (1, 3)])
    adapted = get_peft_model(stacked, LoraConfig(r=4, target_modules=QUERIES, init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 2], [1, 3]]}))

    (tmp_path / "merged").mkdir()
    layout = stream(base, tmp_path / "adapter", tmp_path / "merged").layout
    found = load_file(tmp_path / "merged" / "model.safetensors")
    # PEFT adds to a layer's weight in place, twice if two layers share it; the training was that of separate copies.
    for layer in stacked.model.language_model.layers:
        for module in layer.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.weight = torch.nn.Parameter(module.base_layer.weight.clone())
    assert_equal(found, merged_by_peft(adapted))
    copy_non_weight_files(base, tmp_path / "merged")
    edit_config(tmp_path / "merged", layout)
    assert load_model(tmp_path / "merged")[0].config.text_config.num_hidden_layers == 4


def test_layer_replication_of_a_hybrid_model_is_refused(tiny_46: Path, train: Train, tmp_path: Path) -> None:
    adapter = train(tiny_46).folder
    edit_adapter_config(adapter, layer_replication=[[0, 2], [1, 4]])
    with pytest.raises(UserError, match="layer_replication"):
        merge_streamed(tiny_46, adapter, tmp_path / "merged")


def test_a_base_with_older_tensor_names_can_be_merged(
    tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path
) -> None:
    def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    base = copy_base(tiny_46, tmp_path / "older", without_prefix)
    trained = train(base, modules_to_save=["model.merger"])
    found = merge_streamed(base, trained.folder, tmp_path / "merged")
    assert_equal(found, without_prefix(merged_by_peft(trained.model)))


def test_a_full_fine_tune_replaces_every_tensor(
    tiny_46: Path, bf16_46: Path, copy_base: CopyBase, tmp_path: Path
) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor + 0.01 if "merger" in name else tensor for name, tensor in tensors.items()}

    tuned = copy_base(tiny_46, tmp_path / "tuned", move)
    found = merge_streamed(bf16_46, tuned, tmp_path / "merged")
    for name, tensor in load_file(tuned / "model.safetensors").items():
        assert torch.equal(found[name], tensor.bfloat16()), name


def edit_adapter_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_adapter_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(
    tiny_46: Path, train: Train, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    adapter = train(tiny_46).folder
    edit_adapter_config(adapter, **changes)
    with pytest.raises(UserError, match=named):
        merge_streamed(tiny_46, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: {**tensors, "base_model.model.model.merger.lora_C.weight": torch.ones(2)}, "merger.lora_C"),
        (lambda tensors: {**tensors, "model.merger.weight": torch.ones(2)}, "model.merger.weight"),
        (lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_A" in name}, "incomplete"),
        (lambda tensors: {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}, "layers.9"),
        (lambda tensors: {name: tensor * torch.inf for name, tensor in tensors.items()}, "not finite"),
    ],
)
def test_tensors_that_match_no_tensor_of_the_base_are_refused_by_name(
    tiny_46: Path,
    train: Train,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    named: str,
) -> None:
    adapter = train(tiny_46).folder
    edit_adapter_tensors(adapter, change)
    with pytest.raises(UserError, match=named):
        merge_streamed(tiny_46, adapter, tmp_path / "merged")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_of_another_base_is_refused(tiny_46: Path, train: Train, tmp_path: Path, part: str) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        axis = 1 if part == "lora_A" else 0
        return {name: torch.cat([t, t], dim=axis) if part in name else t for name, t in tensors.items()}

    adapter = train(tiny_46).folder
    edit_adapter_tensors(adapter, widen)
    with pytest.raises(UserError, match="give the base that the adapter was trained on"):
        merge_streamed(tiny_46, adapter, tmp_path / "merged")


def test_a_quantized_tensor_that_would_change_is_refused(
    tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path
) -> None:
    adapter = train(tiny_46).folder

    def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.to(torch.int8) if "q_proj" in name else t for name, t in tensors.items()}

    base = copy_base(tiny_46, tmp_path / "quantized", quantize)
    with pytest.raises(UserError, match=r"q_proj\.weight is stored as I8"):
        merge_streamed(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\xff" * 64, lambda content: b""])
def test_a_damaged_weight_file_is_named(
    tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    adapter = train(tiny_46).folder
    base = copy_base(tiny_46, tmp_path / "damaged")
    file = base / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        merge_streamed(base, adapter, tmp_path / "merged")


def test_an_index_that_names_a_file_outside_its_folder_is_refused(
    tiny_46: Path, train: Train, copy_base: CopyBase, tmp_path: Path
) -> None:
    adapter = train(tiny_46).folder
    base = copy_base(tiny_46, tmp_path / "outside")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UserError, match="outside"):
        merge_streamed(base, adapter, tmp_path / "merged")


def test_changes_are_reported_by_part_of_the_model(tiny_46: Path, train: Train, tmp_path: Path) -> None:
    trained = train(tiny_46, modules_to_save=["model.merger"])
    (tmp_path / "merged").mkdir()
    found = stream(tiny_46, trained.folder, tmp_path / "merged")
    assert found.moved["vision_tower"].changed == 0
    assert found.moved["merger"].changed == found.moved["merger"].tensors == 6
    assert found.moved["language_model"].changed == 4
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_46, tmp_path / "merged"))
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    relative = float((after[name] - before[name]).norm() / before[name].norm())
    assert found.changed[name] == pytest.approx(relative, rel=1e-4)
