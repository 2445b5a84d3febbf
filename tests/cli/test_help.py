"""The help texts, as terminals show them."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from minicpmv_finetune.cli.main import app, main
from minicpmv_finetune.components.train.flags import table
from minicpmv_finetune.components.train.flags_help import help_text
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, defaults


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, by its words."""
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    for name, command in program.commands.items():
        if isinstance(command, TyperGroup):
            yield from ((name, inner) for inner in command.commands)
        else:
            yield (name,)


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize(
    "words", [(), ("schedule",), *(words for words in commands() if words != ("train",))], ids=" ".join
)
def test_help_shows_the_names_of_all_options_whole(
    words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", *words, "--help"])
    command: object = typer.main.get_command(app)
    for word in words:
        assert isinstance(command, TyperGroup)
        command = command.commands[word]
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= min(columns, 110)
    assert "\x1b" not in shown
    shown_parameters = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]  # type: ignore[attr-defined]
    names = {name for parameter in shown_parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    missing = {name for name in names if name.startswith("--") and not re.search(rf"{name}(?![\w-])", shown)}
    assert missing == set()
    variables = {parameter.envvar for parameter in shown_parameters if parameter.envvar}
    assert all(variable in shown for variable in variables)


def test_the_help_shows_commands_and_options_in_their_groups() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Run here:", "Kubeflow:", "Models:", "One step:", "Options:"]
    shown = CliRunner().invoke(app, ["run", "--help"]).stdout
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Data:", "Model:", "Training:", "Evaluation:", "Registry:", "Options:"]


def test_the_help_of_train_begins_with_our_own_flags_and_shows_both_defaults() -> None:
    shown = help_text(defaults(FINETUNE_INPUTS))
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "Model and data:",
        "Training: flags of this project and of the published script:",
        "Adapters:",
        "Flags of transformers.TrainingArguments:",
    ]
    names = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert sorted(names) == sorted(table())
    text = " ".join(shown.split())
    for name, published, in_pipelines in [
        ("use_lora", "false", "true"),
        ("tune_llm", "true", "false"),
        ("learning_rate", "5e-05", "0.0001"),
        ("per_device_train_batch_size", "8", "4"),
    ]:
        both = f"default: {published}; in run and the pipelines: {in_pipelines}"
        assert re.search(rf"--{name} .{{1,200}}\({both}\)", text)


def test_the_help_of_train_needs_no_torch() -> None:
    code = """
import sys
from minicpmv_finetune.cli.main import main
sys.argv[1:] = ["train", "--help"]
try:
    main()
finally:
    sys.exit(f"torch is loaded: {'torch' in sys.modules}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--per_device_train_batch_size" in done.stdout
    assert done.stderr.strip() == "torch is loaded: False"
