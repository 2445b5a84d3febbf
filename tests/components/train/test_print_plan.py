"""The description of a training has the same numbers as the model that is then trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minicpmv_finetune.cli.main import app
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.print_plan import describe_training
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.minicpmv.checkpoint import load_model

LORA = ["--use_lora", "true", "--tune_llm", "false", "--lora_r", "4"]
FULL: list[str] = []


def _flags(base: Path, flags: list[str]) -> list[str]:
    return ["--model_name_or_path", str(base), "--output_dir", "out", "--data_path", "data", *flags]


@pytest.mark.parametrize("version", ["2.6", "4.6"])
@pytest.mark.parametrize(
    "flags", [FULL, ["--tune_vision", "false", "--tune_llm", "false"], LORA, [*LORA, "--tune_vision", "false"]]
)
def test_the_parts_add_up_to_the_model(version: str, flags: list[str], tiny: Callable[[str], Path]) -> None:
    arguments = parse(_flags(tiny(version), flags))
    parts, saved = describe_training(arguments)
    model, generation = load_model(tiny(version), torch.float32)
    base = sum(parameter.numel() for parameter in model.parameters())
    trained, _ = count_parameters(make_trainable(model, generation, arguments))
    assert sum(part.parameters for part in parts) == base
    assert sum(part.trained for part in parts) == trained
    assert f"{trained if flags[:1] == LORA[:1] else base:,} parameters" in saved


def test_each_part_states_how_it_is_trained(tiny_46: Path) -> None:
    parts, saved = describe_training(parse(_flags(tiny_46, [*LORA, "--tune_vision", "false"])))
    assert {part.name: part.how for part in parts} == {
        "vision tower": "frozen",
        "resampler / merger": "trained whole beside the adapters",
        "embeddings": "trained whole beside the adapters",
        "language model": "adapters",
        "head": "frozen",
    }
    assert saved.startswith("a PEFT adapter of ")
    parts, saved = describe_training(parse(_flags(tiny_46, FULL)))
    assert {part.how for part in parts} == {"trained"}
    assert saved.startswith("a whole checkpoint of MiniCPM-V 4.6, ")


def test_the_command_prints_a_table(tiny_46: Path) -> None:
    done = CliRunner().invoke(app, ["train", *_flags(tiny_46, LORA), "--print-plan"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert lines[0] == ["part", "parameters", "trained"]
    parts = ["vision", "resampler", "embeddings", "language", "head"]
    assert [line[0] for line in lines[1:]] == [*parts, "Learning", "Saved:"]
    assert lines[5][-1] == "frozen"
