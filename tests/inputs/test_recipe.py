"""The recipes of the package, and how a recipe and other inputs are joined."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from minicpmv_finetune.cli.main import app
from minicpmv_finetune.cli.options import Inputs, with_inputs
from minicpmv_finetune.components.train.flags import (
    as_flags,
    find_contradictions,
    find_mistakes,
    find_unfit_flags,
    replace_removed_flags,
    take_processes,
)
from minicpmv_finetune.errors import MistakesError, UserError
from minicpmv_finetune.estimate.cost import estimate_memory
from minicpmv_finetune.estimate.published import published_model
from minicpmv_finetune.inputs.checks import _check_kind
from minicpmv_finetune.inputs.planned import planned
from minicpmv_finetune.inputs.recipe import RECIPES, hardware_of, over_recipe, read_recipe, recipe_for
from minicpmv_finetune.inputs.recipe_costs import recipe_cost
from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, INPUTS, RETRAIN_INPUTS, check_inputs
from minicpmv_finetune.minicpmv.generations import GENERATIONS


def inputs_of(name: str) -> dict[str, Any]:
    return check_inputs(FINETUNE_INPUTS, {**read_recipe(name), "data_uri": "d.json"})


def test_there_is_a_recipe_for_each_generation_and_size() -> None:
    sizes = ("24gb", "80gb", "8x80gb")
    assert list(RECIPES) == [f"{one.version}-{size}" for one in GENERATIONS for size in sizes]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(name: str) -> None:
    cost = recipe_cost(name)
    # Estimates of memory were off by up to a fifth.
    assert cost.needed_gb <= 0.8 * cost.memory_gb
    assert planned(inputs_of(name)).recipe.devices == hardware_of(name).devices


@pytest.mark.parametrize("name", RECIPES)
def test_the_flags_of_a_recipe_are_accepted_and_explained(name: str) -> None:
    inputs = inputs_of(name)
    flags, _ = take_processes(as_flags(inputs.pop("training_flags")))
    values, mistakes = find_mistakes(replace_removed_flags(flags, lambda sentence: None))
    together = {**inputs, **values}
    generation = next(one for one in GENERATIONS if name.startswith(one.version))
    assert not [*mistakes, *find_contradictions(together), *find_unfit_flags(together, generation)]
    lines = (Path(planned.__code__.co_filename).parent / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith(f"# MiniCPM-V {generation.version}, ")
    assert all("#" in line for line in lines if not line.startswith(("base_model_uri", "training_flags")))


TRAINED = ("2.6-80gb", "4.6-80gb", "4.6-8x80gb")
OTHERS = (name for name in RECIPES if name not in TRAINED and "-24gb" not in name)


@pytest.mark.parametrize("name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.faults_only) for name in OTHERS)])
def test_a_recipe_trains_as_many_parameters_as_planned(name: str, tiny: Any, tmp_path: Path) -> None:
    from minicpmv_finetune.components.train.arguments import parse
    from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
    from minicpmv_finetune.estimate.cost import read_model
    from minicpmv_finetune.minicpmv.checkpoint import load_model

    base = tiny(name.partition("-")[0])
    inputs = inputs_of(name)
    settings = planned(inputs)
    training = {key: value for key, value in inputs.items() if INPUTS[key].group == "training"}
    further = training.pop("training_flags")
    flags, _ = take_processes(as_flags({**training, **further, "output_dir": tmp_path}))
    common = ["--model_name_or_path", str(base), "--data_path", "nowhere"]
    arguments = parse([*common, *flags], announce=lambda sentence: None)
    trained = make_trainable(*load_model(base), arguments)
    assert count_parameters(trained)[0] == read_model(base, settings.targets).trained(settings.recipe)


@pytest.mark.parametrize(
    ("flags", "whole"),
    [
        ({}, ("embeddings", "merger")),
        ({"q_lora": True}, ("merger",)),
        ({"q_lora": True, "lora_modules_to_save": "embed_tokens"}, ("merger", "embeddings")),
        ({"lora_modules_to_save": "none,resampler"}, ("merger",)),
        ({"lora_modules_to_save": "lm_head"}, ("embeddings", "merger", "head")),
    ],
)
def test_what_is_trained_whole_is_planned(flags: dict[str, Any], whole: tuple[str, ...]) -> None:
    recipe = planned({"training_flags": flags}).recipe
    assert recipe.whole == whole
    assert set(recipe.whole_in_4_bits) == set(planned({"training_flags": {**flags, "q_lora": True}}).recipe.whole)
    with pytest.raises(UserError, match="plan does not count"):
        planned({"training_flags": {"lora_modules_to_save": "norm"}})


def test_adapters_on_the_tower_are_planned_with_the_tower_in_the_backward_pass() -> None:
    all_flags: list[dict[str, Any]] = [{}, {"lora_targets": "llm,vision"}, {"lora_target_modules": ".*q_proj"}]
    settings = [planned({"tune_vision": False, "training_flags": flags}) for flags in all_flags]
    models = [published_model("4.5", one.targets) for one in settings]
    pairs = [(model, one.recipe) for model, one in zip(models, settings, strict=True)]
    assert [model.trains_in_tower(recipe) for model, recipe in pairs] == [False, True, True]
    memories = [estimate_memory(*pair, 2048, 10_240, False)["single GPU"] for pair in pairs]
    assert min(memories[1:]) > memories[0] + 5e9


REPLICATED = {"lora_layer_replication": "0:2,1:2,0:3"}


@pytest.mark.parametrize("version", ["2.6", "4.6", "4.7", "4.6 fine"])
@pytest.mark.parametrize(
    "flags",
    [
        {"lora_targets": "llm,resampler,vision"},
        {"lora_targets": "llm,resampler,vision", "use_dora": True},
        {"lora_targets": "merger"},
        {"lora_targets": "llm,vision", "lora_modules_to_save": "none", "lora_layers_to_transform": "1"},
        {"lora_target_modules": ".*"},
        {"lora_target_modules": r".*(kv_proj|linear_1|out_proj|mlp\.\w*)", "lora_modules_to_save": "lm_head"},
    ],
)
def test_adapters_anywhere_are_counted_as_they_are_trained(
    version: str, flags: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    _check_counts(version, {"tune_vision": False, "training_flags": flags}, tiny, tmp_path)


@pytest.mark.parametrize("inputs", [{}, {"use_lora": False, "tune_llm": True}])
def test_what_a_checkpoint_never_uses_is_not_counted(inputs: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    _check_counts("4.6 fine", inputs, tiny, tmp_path)


@pytest.mark.parametrize("version", ["2.6", "4.0", "4.5"])
@pytest.mark.parametrize(
    "flags",
    [
        REPLICATED,
        {**REPLICATED, "lora_targets": "llm,vision", "use_dora": True},
        {**REPLICATED, "lora_layers_to_transform": "1,4"},
        {**REPLICATED, "lora_target_modules": r"llm\..*layers\.[25]\.mlp\..*"},
        {"lora_layer_replication": "1:2,1:2"},
    ],
)
def test_replicated_layers_are_counted_as_they_are_trained(
    version: str, flags: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    _check_counts(version, {"tune_vision": False, "training_flags": flags}, tiny, tmp_path)


def _check_counts(version: str, inputs: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    """Compare the plan of a run with the model that it would train."""
    from minicpmv_finetune.components.train.arguments import parse
    from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
    from minicpmv_finetune.estimate.cost import read_model
    from minicpmv_finetune.minicpmv.checkpoint import load_model

    published, _, fine = version.partition(" ")
    base = tiny(published)
    if fine:
        base = shutil.copytree(base, tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "downsample_mode": "4x"}))
    run: dict[str, Any] = {"use_lora": True, "tune_llm": False, "tune_vision": True, "lora_r": 8, **inputs}
    settings = planned(run)
    flags = as_flags({**run.pop("training_flags", {}), **run, "output_dir": "out", "data_path": "nowhere"})
    model, generation = load_model(base, device_map="meta")
    with torch.device("meta"):
        trained = make_trainable(model, generation, parse(flags, announce=lambda text: None))
    counted = read_model(base, settings.targets)
    found, total = count_parameters(trained)
    assert found == counted.trained(settings.recipe)
    assert total == counted.total + counted.adapters(settings.recipe)
    assert counted.layers == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora_target_modules": ".*q_proj"}, "give --tune_vision false to train its adapters"),
        ({"tune_vision": False, "lora_target_modules": ".*", "lora_modules_to_save": "resampler"}, "leave it out of"),
        ({"tune_vision": False, "lora_target_modules": ".*q_proj", "lora_modules_to_save": "resampler"}, ""),
        ({"lora_target_modules": r"llm\..*q_proj"}, ""),
        ({"lora_modules_to_save": "resampler"}, ""),
    ],
)
def test_adapters_on_a_part_that_is_trained_whole_are_refused_before_a_run(
    flags: dict[str, Any], sentence: str, tiny: Any
) -> None:
    run = {"use_lora": True, "tune_llm": False, "tune_vision": True, **flags}
    expected: Any = pytest.raises(UserError, match=sentence) if sentence else nullcontext()
    with expected:
        _check_kind(str(tiny("2.6")), run)


def test_other_inputs_replace_those_of_a_recipe_key_by_key() -> None:
    recipe = {"seed": 1, "training_flags": {"save_steps": 1, "q_lora": True}}
    assert over_recipe(recipe, {"seed": "2", "training_flags": '{"save_steps": 5}'}) == {
        "seed": "2",
        "training_flags": {"save_steps": 5, "q_lora": True},
    }
    assert over_recipe(recipe, {"training_flags": "{"})["training_flags"] == "{"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_retraining_with_its_settings_as_training_flags(name: str) -> None:
    found = check_inputs(RETRAIN_INPUTS, {**recipe_for(name, RETRAIN_INPUTS), "data_uri": "d.json"})
    recipe = read_recipe(name)
    for key, value in recipe.items():
        assert found.get(key, found["training_flags"].get(key)) == value or key == "training_flags"
    assert found["training_flags"].items() >= recipe["training_flags"].items()
    assert recipe_for(name, FINETUNE_INPUTS) == recipe


def test_a_command_takes_a_recipe_below_its_options(tmp_path: Path) -> None:
    received: list[Inputs] = []
    small = typer.Typer()

    @small.command()
    @with_inputs(FINETUNE_INPUTS, recipe=True)
    def show(inputs: Inputs, other: Annotated[str, typer.Option()] = "") -> None:
        received.append(inputs)

    file = tmp_path / "mine.yaml"
    file.write_text("data_uri: d.json\nlora_r: 7\nseed: 7\ntraining_flags: {save_steps: 7, q_lora: true}\n")
    words = ["--recipe", str(file), "--seed", "42", "--training-flags", '{"save_steps": 8}']
    done = CliRunner().invoke(small, words)
    assert done.exit_code == 0, done.output
    (found,) = received
    # 42 is the default of the seed too, and is given here.
    assert (found["data_uri"], found["lora_r"], found["seed"]) == ("d.json", 7, 42)
    assert found["training_flags"] == {"save_steps": 8, "q_lora": True}
    assert found["lora_alpha"] == 64
    assert CliRunner().invoke(small, ["--recipe", "4.5-24gb"]).exit_code == 2  # the data is missing
    file.write_text("data_uri: d.json\nlora_r: 0\nseed: -7\n")
    mistaken = CliRunner().invoke(small, ["--recipe", str(file), "--seed", "-1"])
    # Each mistake names the place where it was made: the file's key, or the option.
    assert isinstance(mistaken.exception, MistakesError)
    assert [sentence.partition(":")[0] for sentence in mistaken.exception.sentences] == ["lora_r", "--seed"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lora_rr: 1", "lora_rr: the pipeline has no such input; did you mean lora_r?"),
        ("lora_r: many", "lora_r: 'many' is not a whole number"),
        ("data_uri: 5", "data_uri: 5 is not a text"),
        ("training_flags: {save_stepss: 1}", "save_stepss: no such flag; did you mean --save_steps?"),
        ("training_flags: [1]", "training_flags: [1] is not a JSON object"),
        ("1: 2", "1: the pipeline has no such input"),
        ("- lora_r", "not a YAML mapping of inputs"),
        ("lora_r: 1\nlora_r: 2", "has the key 'lora_r' twice"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_mistake_in_a_recipe_is_refused(command: str, content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    words = [] if "data_uri" in content else ["--data", "missing.json"]
    done = CliRunner().invoke(app, [command, "--recipe", str(file), "--base-model", str(tmp_path), *words])
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception)


def test_an_unknown_recipe_is_refused_with_the_name_that_was_meant() -> None:
    done = CliRunner().invoke(app, ["run", "--recipe", "4.5-24g"])
    assert "did you mean 4.5-24gb?" in str(done.exception)


def test_the_list_shows_memory_and_a_name_the_file() -> None:
    listed = CliRunner().invoke(app, ["recipes"]).stdout
    assert all(name in listed for name in RECIPES)
    printed = CliRunner().invoke(app, ["recipes", "4.5-24gb"]).stdout
    assert "q_lora: true" in printed
