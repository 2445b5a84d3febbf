"""Each step's README, written from its component's signature and docstring, so that it cannot go stale.

`python -m minicpmv_finetune.cli.component_readmes` writes them; a test compares.
"""

import inspect
from pathlib import Path
from typing import Any, get_args

import docstring_parser
from kfp import dsl

from minicpmv_finetune.components.evaluate.component import evaluate
from minicpmv_finetune.components.merge.component import merge
from minicpmv_finetune.components.notify.component import notify
from minicpmv_finetune.components.plan_retraining.component import plan_retraining
from minicpmv_finetune.components.preprocess.component import preprocess
from minicpmv_finetune.components.register.component import register
from minicpmv_finetune.components.train.component import train
from minicpmv_finetune.components.validate_data.component import validate_data

from .main import app

COMPONENTS = (validate_data, preprocess, train, merge, evaluate, register, plan_retraining, notify)
_FOLDER = Path(__file__).parents[1] / "components"


def readme(component: Any) -> str:
    """The Markdown text for one component."""
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
            "A mistake only you can mend ends the step with one sentence that says where it is and what to do, and",
            "exit code 2; it is remembered, so that Kubeflow's retries end at once. A fault of storage or network ends",
            "it with exit code 75, and a retry makes sense.",
            "",
        ]
    )


def _commands() -> set[str]:
    """Names of the command line's commands."""
    functions = [command.callback for command in app.registered_commands if command.callback]
    return {function.__name__.replace("_", "-") for function in functions}


def readme_path(component: Any) -> Path:
    """Where a component's README lies."""
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
