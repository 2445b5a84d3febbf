"""The published flat `config.json` of 2.6, 4.0 and 4.5 is read and written back unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune.minicpmv.configuration import MiniCPMVConfig, find_token_id

PUBLISHED: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "patch_size": 14,
    "slice_config": {"max_slice_nums": 9},
}
VISION: dict[str, Any] = {"hidden_size": 64, "patch_size": 14, "model_type": "siglip"}


@pytest.mark.parametrize(
    ("version", "language_model"), [(2.6, "qwen2"), ("4.0", "llama"), (4, "llama"), (4.5, "qwen3")]
)
def test_the_version_decides_the_language_model(version: Any, language_model: str) -> None:
    config = MiniCPMVConfig(version=version, vision_config=VISION, **PUBLISHED)
    assert config.text_config.model_type == language_model
    assert config.text_config.hidden_size == 256
    assert config.vision_config.hidden_size == 64


@pytest.mark.parametrize("version", [None, 2.5, "4.6"])
def test_the_error_names_an_unknown_version(version: Any) -> None:
    with pytest.raises(ValueError, match=rf"version {version!r} is none of 2\.6, 4\.0, 4\.5"):
        MiniCPMVConfig(version=version, vision_config=VISION, **PUBLISHED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 200}, "hidden_size 200 is not a multiple of 128"),
        ({"patch_size": 16}, "patch_size 16 contradicts vision_config.patch_size 14"),
    ],
)
def test_the_error_names_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniCPMVConfig(version=2.6, vision_config=VISION, **{**PUBLISHED, **fields})


def test_published_fields_are_written_back_with_changed_values() -> None:
    config = MiniCPMVConfig(version=2.6, vision_config=VISION, **PUBLISHED)
    written = config.to_dict()
    assert (
        written.items() >= {**PUBLISHED, "vision_config": VISION, "version": 2.6, "architectures": ["MiniCPMV"]}.items()
    )
    assert "image_token_id" not in written
    assert "quantization_config" not in written
    config.text_config.vocab_size = 704
    config.image_token_id = 3
    config.quantization_config = {"quant_method": "bitsandbytes"}
    changed = {"vocab_size": 704, "image_token_id": 3, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert config.to_dict() == {**written, **changed}
    assert config.to_diff_dict() == config.to_dict()


def test_the_default_vision_config_is_the_published_one() -> None:
    config = MiniCPMVConfig(version=2.6, **PUBLISHED)
    assert (config.vision_config.patch_size, config.vision_config.image_size) == (14, 980)
    assert config.to_dict()["vision_config"]["image_size"] == 980


def test_a_saved_configuration_can_be_loaded(tmp_path: Path) -> None:
    config = MiniCPMVConfig(version=4.5, vision_config=VISION, **PUBLISHED)
    config.text_config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    loaded = MiniCPMVConfig.from_pretrained(tmp_path)
    assert loaded.text_config.num_hidden_layers == 3
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": {"added_tokens": [{"content": "<s>", "id": 0}, {"content": "<unk>", "id": 7}]}}, 7),
        ({"tokenizer.json": {"model": {"vocab": {"<unk>": 5, "a": 6}}}}, 5),
        ({"tokenizer.json": {"model": {"vocab": [["<unk>", 0.0]]}}}, None),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "a"}, "9": {"content": "<unk>"}}}}, 9),
        ({"tokenizer.json": {}, "tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<unk>"}}}}, 9),
        ({"tokenizer.json": {}, "tokenizer_config.json": {}}, None),
        ({}, None),
    ],
)
def test_a_tokens_id_is_found_in_either_tokenizer_file(
    tmp_path: Path, files: dict[str, object], expected: int | None
) -> None:
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))
    assert find_token_id(tmp_path, "<unk>") == expected
