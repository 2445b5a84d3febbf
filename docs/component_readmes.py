"""Write the README of each step from its component's signature and docstring, so that the two cannot differ.

`make readmes` runs this file; `tests/docs/test_component_readmes.py` compares the result with the committed files.
"""

import inspect
from pathlib import Path
from typing import Any, get_args

import docstring_parser
import typer
from kfp import dsl
from typer.core import TyperGroup

from minicpmv_finetune.cli.main import app
from minicpmv_finetune.components.evaluate.component import evaluate
from minicpmv_finetune.components.merge.component import merge
from minicpmv_finetune.components.notify.component import notify
from minicpmv_finetune.components.plan_retraining.component import plan_retraining
from minicpmv_finetune.components.preprocess.component import preprocess
from minicpmv_finetune.components.register.component import register
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.validate_data.component import validate_data

COMPONENTS = (validate_data, preprocess, train, merge, evaluate, register, plan_retraining, notify)
_FOLDER = Path(__file__).parents[1] / "minicpmv_finetune" / "components"


def readme(component: Any) -> str:
    """Return the Markdown text for one component."""
    function = component.python_func
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {item.arg_name: (item.description or "").replace("\n", " ") for item in documented.params}
    inputs: list[str] = []
    outputs: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, direction = _kind(parameter.annotation)
        row = f"| `{name}` | {kind} | {described[name]} |"
        (outputs if direction == "output" else inputs).append(row)
    command = component.name
    returned = documented.returns.description if documented.returns else ""
    return "\n".join(
        [
            f"# {command}",
            "",
            f"{documented.short_description}",
            "",
            "| Input | Type | Meaning |",
            "|---|---|---|",
            *inputs,
            "",
            "| Output | Type | Meaning |",
            "|---|---|---|",
            *outputs,
            "",
            *([f"Returns: {' '.join((returned or '').split())}", ""] if returned else []),
            *([f"Without Kubeflow: `minicpmv-finetune {command} --help`.", ""] if command in _commands() else []),
            "A mistake in the inputs or the data ends the step with exit code 2 and one sentence that names the place,",
            "the cause and the remedy. After a fault of storage or network a step of a pipeline repeats itself, and",
            "ends with exit code 75 if it stays ([who tries again](../../../docs/reliability.md#who-tries-again)).",
            "",
        ]
    )


def _commands() -> set[str]:
    """Return the names of the command line's commands."""
    group = typer.main.get_command(app)
    return set(group.commands) if isinstance(group, TyperGroup) else set()


def readme_path(component: Any) -> Path:
    """Path of a component's README."""
    return _FOLDER / component.name.replace("-", "_") / "README.md"


def _kind(annotation: Any) -> tuple[str, str]:
    arguments = get_args(annotation)
    if isinstance(annotation, dsl.OutputPath):
        return "JSON object" if annotation.type is dict else annotation.type.__name__, "output"
    if getattr(annotation, "__metadata__", None):
        direction = "output" if "Output" in str(annotation.__metadata__[0]) else "input"
        return arguments[0].__name__, direction
    return ("JSON object" if arguments else annotation.__name__), "input"


if __name__ == "__main__":
    for item in COMPONENTS:
        readme_path(item).write_text(readme(item))
