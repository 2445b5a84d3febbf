"""Recipes: YAML files of a run's inputs by name, with one for each generation and size of GPU in the package.

A shipped recipe contains everything about the training, and nothing about the data. `--recipe` takes its name, or a
file of the user's own, which may contain any input.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.options import did_you_mean, read_json
from minicpmv_finetune.yaml_files import read_mapping

from .table import INPUTS, Input

FOLDER = Path(__file__).with_name("recipes")
RECIPES = tuple(sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (name[:3], len(name), name)))
"""Names of the shipped recipes, by generation and then by hardware."""


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a shipped recipe is for.

    Attributes:
        devices: Number of GPUs.
        gigabytes: Memory of each.
    """

    devices: int
    gigabytes: int


def hardware_of(name: str) -> Hardware:
    """The GPUs of a shipped recipe, by its name such as `4.5-8x80gb`."""
    found = re.fullmatch(r".*-(?:(\d+)x)?(\d+)gb", name)
    assert found, name  # noqa: S101 - a test reads every name
    return Hardware(int(found[1] or 1), int(found[2]))


def recipe_path(name_or_file: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: There is neither a recipe of this name nor such a file.
    """
    if name_or_file in RECIPES:
        return FOLDER / f"{name_or_file}.yaml"
    path = storage.local_path(name_or_file)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{name_or_file}: neither a recipe nor a file; {did_you_mean(name_or_file, RECIPES)}"
            "`minicpmv-finetune recipes` lists the recipes."
        )
    return path


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """The inputs that a recipe contains, as they are written there; the checks of the run look at them.

    Args:
        name_or_file: Name of a recipe of the package, or path of a YAML file.

    Raises:
        UserError: There is no such recipe, or its file is not a YAML mapping.
    """
    remedy = "give a YAML file with lines like data_uri: s3://…"
    content = read_mapping(recipe_path(name_or_file), "inputs by name", remedy)
    return {str(name): value for name, value in content.items()}


def recipe_for(name_or_file: str, inputs: Sequence[Input]) -> dict[str, Any]:
    """A recipe's inputs for a pipeline; a setting of the training that is no input of it becomes a training flag.

    Args:
        name_or_file: Name of a recipe of the package, or path of a YAML file of inputs.
        inputs: The pipeline's inputs: retraining has the settings of the training as flags alone.

    Raises:
        UserError: There is no such recipe, or its file is not a YAML mapping.
    """
    recipe = read_recipe(name_or_file)
    names, flags = {row.name for row in inputs}, recipe.get("training_flags") or {}
    moved = [name for name in recipe if name not in names and name in INPUTS and INPUTS[name].group == "training"]
    if not moved or not isinstance(flags, dict):
        return recipe
    kept = {name: value for name, value in recipe.items() if name not in moved}
    return {**kept, "training_flags": {**{name: recipe[name] for name in moved}, **flags}}


def over_recipe(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's inputs with others over them; of a JSON object each key replaces that of the recipe.

    Args:
        recipe: Inputs by name.
        given: Inputs that replace them; a JSON object may be text.
    """
    merged = dict(recipe)
    for name, value in given.items():
        below, above = recipe.get(name), value
        if name in INPUTS and INPUTS[name].type is dict and isinstance(below, dict):
            if isinstance(above, str):
                with suppress(ValueError):  # the checks of the run say what is wrong with it
                    above = read_json(above, name)
            if isinstance(above, dict):
                merged[name] = {**below, **above}
                continue
        merged[name] = value
    return merged
