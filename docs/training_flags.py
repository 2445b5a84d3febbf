"""Write the table of training flags from the training script's own parser.

    python docs/training_flags.py

`make readmes` runs this file; `tests/docs/test_training_flags.py` compares the result with the committed table. The
table lets a run check its flags in a moment, because the parser itself imports torch and transformers.
"""

import argparse
import dataclasses
import json
from typing import Any

import torch
import transformers
from transformers.training_args import OptimizerNames

from minicpmv_finetune.components.train.arguments import (
    IN_DIGEST,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    parser,
)
from minicpmv_finetune.components.train.flags import TABLE_PATH
from minicpmv_finetune.minicpmv.generations import GENERATIONS

_JSON_FLAGS = {*transformers.TrainingArguments._VALID_DICT_FIELDS, "liger_kernel_config", "parallelism_config"}
_GROUPS = {
    item.name: name
    for name, owner in {
        "data": ModelArguments,
        "training": TrainingArguments,
        "adapters": LoraArguments,
    }.items()
    for item in dataclasses.fields(owner)
    if IN_DIGEST in item.metadata
} | {item.name: "data" for item in dataclasses.fields(DataArguments)}
_MAY_BE_FILES = {"accelerator_config", "deepspeed", "fsdp_config"}


def table() -> str:
    """Return the table as JSON, one flag a line."""
    rows = {}
    for action in parser()._actions:
        if action.dest == "help":
            continue
        names = [name.removeprefix("--") for name in action.option_strings]
        rows[names[0]] = _row(action)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n}}\n"


def _row(action: argparse.Action) -> dict[str, Any]:
    """Everything that `flags.Flag` says of a flag."""
    values = {None: "one", "?": "optional", "+": "several", 0: "none"}[action.nargs]
    default = action.default if isinstance(action.default, str | int | float | bool | None) else str(action.default)
    return {
        "type": _type_of(action),
        "values": values,
        "choices": _choices(action),
        "group": _GROUPS.get(action.dest, "transformers"),
        "default": default,
        "help": " ".join((action.help or "").split()),
    }


def _type_of(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "str")
    if action.nargs == 0 or name == "string_to_bool":
        return "bool"
    if action.dest in _JSON_FLAGS:
        return "json_or_file" if action.dest in _MAY_BE_FILES else "json"
    return name if name in ("int", "float") else "str"


def _choices(action: argparse.Action) -> list[str]:
    # These flags are plain text to the parser, and checked behind it.
    if action.dest == "optim":
        return [str(name.value) for name in OptimizerNames]
    if action.dest == "lora_bias":
        return ["none", "all", "lora_only"]
    if action.dest == "llm_type":
        ours = {name for one in GENERATIONS for name in (one.llm_type, *one.older_llm_types)}
        return sorted({"minicpm", "llama3"} | ours)
    if action.dest == "debug":
        return ["underflow_overflow", "tpu_metrics_debug"]
    if action.dest == "torch_compile_mode":
        return list(torch._inductor.list_mode_options())
    if action.dest == "train_sampling_strategy":
        # batch_rebalance reads every sample to find its length; group_by_length takes the lengths from the manifest.
        return [str(choice) for choice in action.choices or () if choice != "batch_rebalance"]
    return [str(choice) for choice in action.choices or ()]


if __name__ == "__main__":
    TABLE_PATH.write_text(table())
