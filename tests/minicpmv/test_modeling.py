"""The model of 2.6, 4.0 and 4.5: options, inputs, saving and errors; tests/parity compares its numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.trainable import make_trainable
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.minicpmv.modeling import (
    Groups,
    MiniCPMVForConditionalGeneration,
    PatchGrid,
    _nearest_position_table,
    sincos_table,
)

SIZES = torch.tensor([[4, 6], [7, 3], [1, 1]])
QUERIES = 16
PARITY = Path(__file__).parents[1] / "parity" / "golden"


@pytest.fixture(scope="module", params=["2.6", "4.0", "4.5"])
def folder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder, torch.float32)[0].eval()


@pytest.fixture
def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two rows, with two images and with one; 16 image tokens for each image."""
    torch.manual_seed(0)
    image = [model.config.image_token_id] * QUERIES
    rows = [[20, *image, 21, *image, 22, 23, 24], [30, 31, *image, 32] + [33] * (QUERIES + 2)]
    patches = int(SIZES.prod(1).sum())
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.ones(2, len(rows[0]), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 14, 14 * patches),
        "target_sizes": SIZES,
    }


@torch.no_grad()
def test_precomputed_features_equal_pixels(model: Any, batch: dict[str, torch.Tensor]) -> None:
    pixels = {name: batch.pop(name) for name in ("pixel_values", "target_sizes")}
    features = model.get_image_features(**pixels)
    assert features.shape == (3, QUERIES, model.config.text_config.hidden_size)
    assert torch.equal(model(**batch, vision_features=features).logits, model(**batch, **pixels).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**batch, vision_features=features, **options), model.generate(**batch, **pixels, **options)
    )


@torch.no_grad()
def test_slices_do_not_see_each_other(model: Any, batch: dict[str, torch.Tensor]) -> None:
    batched = model.get_image_features(batch["pixel_values"], SIZES)
    parts = batch["pixel_values"].split((SIZES.prod(1) * 14).tolist(), dim=-1)
    for pixels, size, features in zip(parts, SIZES, batched, strict=True):
        single = model.get_image_features(pixels, size.unsqueeze(0))[0]
        torch.testing.assert_close(features, single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_beam_search_of_a_batch_equals_that_of_single_rows(model: Any, batch: dict[str, torch.Tensor]) -> None:
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batched = model.generate(**batch, **options)
    patches = SIZES.prod(1) * 14
    parts = [(slice(0, 2), slice(0, int(patches[:2].sum()))), (slice(2, 3), slice(int(patches[:2].sum()), None))]
    for number, (slices, columns) in enumerate(parts):
        row = {name: batch[name][number : number + 1] for name in ("input_ids", "attention_mask")}
        single = model.generate(
            **row, pixel_values=batch["pixel_values"][..., columns], target_sizes=SIZES[slices], **options
        )
        assert torch.equal(batched[number], single[0])


def test_the_error_for_unequal_image_tokens_and_features_contains_both_counts(
    model: Any, batch: dict[str, torch.Tensor]
) -> None:
    batch["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match=f"{3 * QUERIES - 1} image tokens, .* {3 * QUERIES} features"):
        model(**batch)


def test_images_without_input_ids_are_refused(model: Any, batch: dict[str, torch.Tensor]) -> None:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds was given with images"):
        model(**{**batch, "input_ids": None, "inputs_embeds": embedded})


def test_the_error_for_unequal_patches_and_sizes_contains_both_counts(
    model: Any, batch: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"46 patches, .* describes 45"):
        model(**batch | {"target_sizes": torch.tensor([[4, 6], [7, 3]])})


@torch.no_grad()
def test_padding_with_the_image_token_receives_no_features(model: Any, batch: dict[str, torch.Tensor]) -> None:
    # In MiniCPM-V 4.0 the padding token is also the image token.
    plain = model(**batch).logits
    padding = torch.full((2, 3), model.config.image_token_id)
    padded = batch | {
        "input_ids": torch.cat([batch["input_ids"], padding], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(padding)], dim=1),
    }
    torch.testing.assert_close(model(**padded).logits[:, :-3], plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_last_vision_layer_can_be_removed(folder: Path, tmp_path: Path) -> None:
    shortened = shutil.copytree(folder, tmp_path / "checkpoint")
    config = json.loads((shortened / "config.json").read_text()) | {"drop_vision_last_layer": True}
    (shortened / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"unexpected tensors vpm\.encoder\.layers\.2"):
        load_model(shortened)
    tensors = load_file(shortened / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vpm.encoder.layers.2.")}
    save_file(kept, shortened / "model.safetensors", {"format": "pt"})
    models: list[Any] = [load_model(path, torch.float32)[0].eval() for path in (shortened, folder)]
    short, complete = models
    del complete.vpm.encoder.layers[2]
    pixels = torch.randn(1, 3, 14, 14 * 6)
    sizes = torch.tensor([[2, 3]])
    assert torch.equal(short.get_image_features(pixels, sizes), complete.get_image_features(pixels, sizes))


def test_a_saved_config_contains_every_published_field(folder: Path, tmp_path: Path) -> None:
    model: Any = load_model(folder)[0]
    model.save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert {name: after.get(name) for name in before} == before
    assert {*after} - {*before} <= {"image_token_id", "transformers_version", "use_cache", "drop_vision_last_layer"}
    # The saved configuration contains the image token, so the saved folder needs no tokenizer.
    reloaded = MiniCPMVForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.config.image_token_id == model.config.image_token_id


def test_transformers_auto_classes_load_the_model_without_remote_code(folder: Path) -> None:
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert AutoConfig.from_pretrained(folder).text_config.model_type in {"qwen2", "llama", "qwen3"}
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        assert isinstance(auto.from_pretrained(folder), MiniCPMVForConditionalGeneration)


def test_attention_can_be_changed_after_loading(model: Any) -> None:
    model.set_attn_implementation("eager")
    parts = (model, model.llm, model.vpm)
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 3


def test_a_model_with_replicated_layers_can_be_trained_saved_and_loaded(
    folder: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    flags = [
        "--data_path",
        "data",
        "--output_dir",
        "out",
        "--use_cpu",
        "true",
        "--use_lora",
        "true",
        "--tune_llm",
        "false",
    ]
    arguments = parse([*flags, "--lora_r", "2", "--lora_layer_replication", "0:2,1:3"], announce=lambda _: None)
    trained = make_trainable(load_model(folder, torch.float32)[0], detect_generation(folder), arguments)
    assert isinstance(trained, PeftModel)
    base: Any = trained.get_base_model()
    assert len(base.llm.model.layers) == 4
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trained(**batch, labels=batch["input_ids"]).loss.backward()
    trained.save_pretrained(str(tmp_path))
    reloaded: Any = load_with_adapter(folder, tmp_path, torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trained.eval()(**batch).logits)
        reloaded.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("ranges", ["0:9", "2:1", "0-2", "0:2,", "a:b"])
def test_invalid_ranges_of_layers_are_refused(tiny: Callable[[str], Path], ranges: str) -> None:
    flags = [
        "--data_path",
        "data",
        "--output_dir",
        "out",
        "--use_cpu",
        "true",
        "--use_lora",
        "true",
        "--tune_llm",
        "false",
    ]
    arguments = parse([*flags, "--lora_layer_replication", ranges], announce=lambda _: None)
    with pytest.raises(UserError, match=r"give ranges of the 3 layers.*\.$"):
        make_trainable(load_model(tiny("2.6"))[0], detect_generation(tiny("2.6")), arguments)


@pytest.mark.parametrize("llm_type", ["minicpm", "llama3"])
def test_another_llm_type_is_refused(folder: Path, llm_type: str) -> None:
    arguments = parse(
        ["--data_path", "data", "--output_dir", "out", "--use_cpu", "true", "--llm_type", llm_type],
        announce=lambda _: None,
    )
    with pytest.raises(UserError, match=f"--llm_type {llm_type} contradicts the checkpoint.*qwen"):
        make_trainable(load_model(folder)[0], detect_generation(folder), arguments)


def test_the_published_name_for_4_0_is_accepted(tiny: Callable[[str], Path]) -> None:
    flags = ["--data_path", "data", "--output_dir", "out", "--use_cpu", "true", "--llm_type", "llama"]
    model, generation = load_model(tiny("4.0"), torch.float32)
    assert make_trainable(model, generation, parse(flags)) is model


def test_the_older_name_of_the_same_llm_type_is_accepted(tiny: Callable[[str], Path]) -> None:
    flags = ["--data_path", "data", "--output_dir", "out", "--use_cpu", "true", "--llm_type", "qwen2"]
    arguments = parse(flags, announce=lambda _: None)
    make_trainable(load_model(tiny("2.6"))[0], detect_generation(tiny("2.6")), arguments)


@torch.no_grad()
def test_frames_of_a_group_get_one_set_of_features_that_depends_on_time(
    model: Any, batch: dict[str, torch.Tensor]
) -> None:
    pixels = batch["pixel_values"]
    plain = model.get_image_features(pixels, SIZES)
    untimed = model.get_image_features(pixels, SIZES, temporal_ids=[[-1], [-1], [-1]])
    grouped = model.get_image_features(pixels, SIZES, temporal_ids=[[0, 1], [-1]])
    later = model.get_image_features(pixels, SIZES, temporal_ids=[[0, 5], [-1]])
    assert torch.equal(untimed, plain)
    assert len(grouped) == 2
    torch.testing.assert_close(grouped[1], plain[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(grouped[0], later[0], atol=1e-4)
    with pytest.raises(ValueError, match="2 frames, but there are 3 slices"):
        model.get_image_features(pixels, SIZES, temporal_ids=[[0, 1]])


def test_patch_grids_are_in_row_order() -> None:
    grid = PatchGrid.from_target_sizes(torch.tensor([[1, 2], [2, 2]], dtype=torch.int32))
    assert grid.lengths.tolist() == [2, 4]
    assert grid.slice_ids.tolist() == [0, 0, 1, 1, 1, 1]
    assert grid.row.tolist() == [0, 0, 0, 0, 1, 1]
    assert grid.column.tolist() == [0, 1, 0, 1, 0, 1]


def test_groups_are_padded_with_zeros_at_the_end() -> None:
    packed = torch.tensor([[1.0], [2.0], [3.0]])
    groups = Groups.from_lengths(torch.tensor([1, 2]), torch.tensor([0, 1, 1]), packed.device)
    padded = groups.pad(packed)
    assert padded[..., 0].tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert groups.mask is not None
    assert groups.mask.tolist() == [[True, False], [True, True]]
    assert torch.equal(groups.unpad(padded), packed)


def test_groups_of_one_length_are_neither_padded_nor_masked() -> None:
    packed = torch.arange(8.0).view(4, 2)
    groups = Groups.from_lengths(torch.tensor([2, 2]), torch.tensor([0, 0, 1, 1]), packed.device)
    assert groups.mask is None
    assert groups.pad(packed).tolist() == packed.view(2, 2, 2).tolist()
    assert groups.pad(packed).data_ptr() == packed.data_ptr()
    assert torch.equal(groups.unpad(groups.pad(packed)), packed)


def test_sines_come_before_cosines() -> None:
    table = sincos_table(torch.tensor([0, 3]), 4)
    expected = torch.tensor(
        [[0.0, 0.0, 1.0, 1.0], [*torch.tensor([3.0, 0.03]).sin(), *torch.tensor([3.0, 0.03]).cos()]]
    )
    torch.testing.assert_close(table, expected)


def test_positions_equal_those_of_the_published_code() -> None:
    recorded = json.loads((PARITY / "positions" / "axis70.json").read_text())
    numbers = range(1, 141)
    table = _nearest_position_table(recorded["side"], max(numbers))
    found = {str(number): table[number, :number].tolist() for number in numbers}
    differing = [number for number, positions in found.items() if positions != recorded["axis"][number]]
    assert differing == []
