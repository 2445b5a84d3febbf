"""The tables of docs/migrating.md against the flags and inputs of this project."""

import re
import shlex
from pathlib import Path

import pytest

from minicpmv_finetune.components.train.flags import as_flags, check_flags, table
from minicpmv_finetune.inputs.recipe import read_recipe
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, check_inputs
from tests.docs.pages import ROOT, blocks

PAGE = (ROOT / "docs" / "migrating.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## From (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
INPUTS = {row.name for row in FINETUNE_INPUTS}
INPUT_OF = {"model_name_or_path": "base_model_uri", "data_path": "data_uri", "eval_data_path": "eval_data_uri"}

# Every field of the dataclasses in the published finetune.py, with its default.
PUBLISHED = {
    "model_name_or_path": "openbmb/MiniCPM-V-2",
    "data_path": None,
    "eval_data_path": None,
    "cache_dir": None,
    "optim": "adamw_torch",
    "model_max_length": 2048,
    "tune_vision": True,
    "tune_llm": True,
    "llm_type": "minicpm",
    "use_lora": False,
    "max_slice_nums": 9,
    "lora_r": 64,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "lora_target_modules": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)",
    "lora_weight_path": "",
    "lora_bias": "none",
    "q_lora": False,
    "lora_modules_to_save": "",
    "lora_layer_replication": None,
    "lora_layers_to_transform": None,
    "lora_layers_pattern": None,
}
OTHER_DEFAULTS = {"model_name_or_path", "llm_type"}
# The flags of the published launch script for LoRA, which does without an edit what it did.
SCRIPT = r"""
--model_name_or_path openbmb/MiniCPM-V-2_6 --llm_type qwen --data_path train.json --eval_data_path eval.json
--remove_unused_columns false --label_names labels --prediction_loss_only false --bf16 false --bf16_full_eval false
--fp16 true --fp16_full_eval true --do_train --do_eval --tune_vision true --tune_llm false --use_lora true
--lora_target_modules 'llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)' --model_max_length 2048
--max_slice_nums 9 --max_steps 10000 --eval_steps 1000 --output_dir output/output_lora
--logging_dir output/output_lora --logging_strategy steps --per_device_train_batch_size 1
--per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy steps --save_strategy steps
--save_steps 1000 --save_total_limit 10 --learning_rate 1e-6 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01
--lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing true --deepspeed ds_config_zero2.json
--report_to tensorboard
"""


def rows(section: str) -> list[list[str]]:
    """Return the cells of a section's table without its head, code spans without their marks."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[1:]]


@pytest.mark.parametrize("name", list(SECTIONS))
def test_flags_and_inputs_of_the_tables_exist(name: str) -> None:
    assert len(rows(SECTIONS[name])) > 20
    for theirs, flag, given, _ in rows(SECTIONS[name]):
        assert flag == "–" or flag in table(), theirs
        assert given == "–" or given in INPUTS, theirs
        if flag != "–":
            # A flag that is an input of its own is refused in training_flags.
            own = INPUT_OF.get(flag, flag)
            assert given == (own if own in INPUTS else "training_flags"), theirs


def test_every_published_flag_is_listed_and_has_its_default() -> None:
    assert [(theirs, flag) for theirs, flag, *_ in rows(SECTIONS["finetune.py"])] == [
        (name, name) for name in PUBLISHED
    ]
    differing = {name for name, default in PUBLISHED.items() if (table()[name].default or None) != (default or None)}
    assert differing == OTHER_DEFAULTS


def test_the_published_script_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    flags = check_flags(shlex.split(SCRIPT), said.append)
    assert flags[flags.index("--eval_strategy") + 1] == "steps"
    assert flags[flags.index("--warmup_steps") + 1] == "0.01"
    assert "--logging_dir" not in flags
    assert any("logging_dir" in sentence for sentence in said)


@pytest.mark.parametrize("name", ["ms-swift", "LLaMA-Factory"])
def test_the_recipe_of_an_example_is_accepted(name: str, tmp_path: Path) -> None:
    (block,) = [block for block in blocks(SECTIONS[name]) if block.language == "yaml"]
    (tmp_path / "mine.yaml").write_text(block.text)
    inputs = check_inputs(FINETUNE_INPUTS, {**read_recipe(str(tmp_path / "mine.yaml")), "data_uri": "train.jsonl"})
    check_flags(["--data_path", "shards", "--tune_llm", "false", *as_flags(inputs["training_flags"])])


def test_names_that_all_programs_share_are_flags_here() -> None:
    shared = re.findall(r"`(\w+)`", PAGE.partition("Flags with the same name")[2])
    check_flags(["--data_path", "shards", *as_flags(dict.fromkeys(["warmup_ratio"], 0.1))])
    assert [name for name in shared if name not in table() and name != "warmup_ratio"] == []
