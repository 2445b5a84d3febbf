"""`train --help`: every flag with its default, in groups, this project's own first; from the table, without torch."""

import argparse
import shutil
from collections.abc import Mapping
from typing import Any

from minicpmv_finetune.terminal import WIDEST

from .flags import Flag, table

_GROUPS = {
    "data": "Model and data",
    "training": "Training: flags of this project and of the published script",
    "adapters": "Adapters",
    "transformers": "Flags of transformers.TrainingArguments",
}
_USAGE = "minicpmv-finetune train [FLAGS.yaml] --data_path SHARDS --output_dir OUT [--flag value ...]"
_DESCRIPTION = (
    "Train with torchrun, one process per GPU. A YAML file of flags may come first. --print-plan only prints what "
    "would be trained, frozen and saved; --quiet shows only warnings and mistakes."
)
_CHOSEN = {
    "logging_steps": "10, fewer in a short training",
    "save_strategy": "each epoch and every 10 minutes, in at most 5 %% of the time",
    "save_steps": "see save_strategy",
}
"""Defaults that depend on the training; `intervals` has them."""
_METAVARS = {"int": "N", "float": "X", "bool": "BOOL", "str": "TEXT", "json": "JSON", "json_or_file": "JSON|FILE"}


def help_text(pipeline_defaults: Mapping[str, Any]) -> str:
    """The help for a terminal.

    Args:
        pipeline_defaults: Defaults of `run` and the pipelines, shown where they differ.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    parser = argparse.ArgumentParser(
        usage=_USAGE,
        description=_DESCRIPTION,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=8, width=width),
    )
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for flag in table().values():
        groups[flag.group].add_argument(
            f"--{flag.name}", metavar=_metavar(flag), help=_help(flag, pipeline_defaults.get(flag.name, flag.default))
        )
    return parser.format_help()


def _metavar(flag: Flag) -> str:
    short = "|".join(flag.choices)
    return short if short and len(short) < 40 else _METAVARS[flag.type]


def _help(flag: Flag, in_pipelines: Any) -> str:
    default = _CHOSEN.get(flag.name) or _shown(flag.default)
    notes = [f"default: {default}"] if default else []
    if in_pipelines != flag.default:
        notes.append(f"in run and the pipelines: {_shown(in_pipelines)}")
    text = flag.help.replace("%", "%%")
    return f"{text} ({'; '.join(notes)})" if notes else text or "-"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value).replace("%", "%%")
