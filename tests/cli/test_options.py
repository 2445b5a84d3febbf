"""Options and help texts of the commands."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import typer
from typer.testing import CliRunner

from minicpmv_finetune.cli import kubeflow, local, models, steps
from minicpmv_finetune.cli.main import app
from minicpmv_finetune.cli.options import absolute, not_empty
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.inputs import checks
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, REQUIRED, RETRAIN_INPUTS, Input


def _commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command by its words, including the commands of groups."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        is_group = hasattr(command, "commands")
        found |= _commands(command, f"{name} ") if is_group else {f"{before}{name}": command}
    return found


COMMANDS = _commands(typer.main.get_command(app))


@pytest.mark.parametrize(("command", "inputs"), [("run", FINETUNE_INPUTS), ("retrain", RETRAIN_INPUTS)])
def test_local_pipelines_have_an_option_for_every_input(command: str, inputs: tuple[Input, ...]) -> None:
    offered = {option.name: option for option in COMMANDS[command].params}
    assert set(offered) == {item.name for item in inputs} | {"recipe", "out", "runner", "fresh", "quiet", "output"}
    for item in inputs:
        option = offered[item.name]
        assert (item.option or f"--{item.name.replace('_', '-')}") in option.opts
        assert option.required == (item.default is REQUIRED)
        if item.default is not REQUIRED:
            default = json.loads(str(option.default)) if item.type is dict else option.default
            assert default == item.default


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert len(command.help or "") > 30
    for option in command.params:
        assert option.param_type_name == "argument" or option.help, option.name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--data", "d.json", "--lora-r", "0", "--seed", "-1"], "3 inputs are wrong. --lora-r: 0"),
        (["retrain", "--data", "d.json", "--start-from", "bse"], "did you mean base"),
        (["plan", "--data", "d.json", "--num-train-epochs", "-3"], "--num-train-epochs: -3.0 is not accepted"),
        (["validate-data", "--data", "d.json", "--out", "o", "--max-reject-ratio", "5"], "give at most 1"),
        (["run", "--data", "d.json", "--training-flags", "[]"], "--training-flags: must be a JSON object"),
        (["run", "--data", "d.json", "--data-options", "{"], "--data-options: invalid JSON"),
        (["run", "--data", "d.json", "--data-options", '{"seed": 1, "seed": 2}'], "--data-options: has 'seed' twice"),
        (["upload", "x" * 256], "longer than a path can be"),
        (["compile", "half\udce9.yaml"], "not UTF-8 text"),
        (["plan", "--data", "d.json", "--eval-fraction", "1"], "eval_fraction: 1.0 is not accepted; give less than 1."),
    ],
)
def test_a_mistake_is_reported_before_any_work(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_check_kind", lambda *arguments: None)  # the default is on the hub
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError)
    assert sentence in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("preprocess --base-model base --dataset base --out o", "base: no dataset.json here"),
        ("merge --base-model base --adapter base --shards base --out o", "base: no training.json here"),
        ("evaluate --model base --dataset base --out o", "base: no dataset.json here"),
    ],
)
def test_a_wrong_folder_is_found_before_torch_is_imported(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "minicpmv4_6"}')
    for step in ("preprocess.preprocess", "merge.merge", "evaluate.evaluate"):
        monkeypatch.setitem(sys.modules, f"minicpmv_finetune.components.{step}", None)
    done = CliRunner().invoke(app, words.split())
    assert isinstance(done.exception, UserError), done.exception
    assert sentence in str(done.exception)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, command in COMMANDS.items()
        for option in command.params
        if "PATH" in str(option.metavar) or option.name in ("out", "source")
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_empty_path_is_not_the_working_directory(
    name: str, option: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    others = [other for other in COMMANDS[name].params if other.required and other is not option]
    words = name.split()
    for other in (*others, option):
        is_argument = other.param_type_name == "argument"
        words += [*([] if is_argument else other.opts[:1]), "" if other is option else "x"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError), done.output
    assert str(done.exception) == f"{'SOURCE' if option.name == 'source' else option.opts[0]}: empty; give a path."
    assert not list(tmp_path.iterdir())


def test_every_path_is_refused_if_it_is_empty() -> None:
    for group in (kubeflow, local, models, steps):
        for command in group.app.registered_commands:
            for name, annotated in inspect.get_annotations(cast("Any", command.callback)).items():
                kind, *more = get_args(annotated) or (annotated,)
                if kind is Path or Path in get_args(kind):
                    assert more[0].parser, f"{command.callback}: {name} must be a path_option"


def test_the_home_folder_is_found_where_the_shell_has_left_its_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert not_empty("--out")("~/run") == tmp_path / "run"
    assert absolute("~/base") == str(tmp_path / "base")
    with pytest.raises(UserError, match="no such home directory"):
        not_empty("--out")("~nobody-of-this-name/run")


def test_a_place_is_refused_before_the_inputs_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_run", lambda *arguments: pytest.fail("checked the inputs first"))
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("run", "retrain"):
        done = CliRunner().invoke(app, [command, "--data", "d.json", "--out", str(tmp_path)])
        assert isinstance(done.exception, UserError)
        assert "did not write" in str(done.exception)
