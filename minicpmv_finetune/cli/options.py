"""Options that several commands share; the options for a pipeline's inputs come from the table of inputs."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minicpmv_finetune import environment
from minicpmv_finetune.errors import MistakesError, UserError
from minicpmv_finetune.inputs.table import INPUTS, REQUIRED, Input, check_inputs
from minicpmv_finetune.options import read_json

Output = Literal["text", "json"]
OutputFormat = Annotated[Output, typer.Option("--output", help="Text, or one JSON document for a program.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only warnings and mistakes.")]
Inputs = Mapping[str, Any]
"""The parameter of a command that `with_inputs` turns into options."""


def _path(text: str) -> Path:
    """The path, with `~` as the home folder also where the shell has left it, as in `--out=~/run`.

    Raises:
        UserError: No file can have this path. (That a place must not be in a store is the command's own sentence.)
    """
    if "://" in text:
        return Path(text)
    from minicpmv_finetune import storage

    return storage.local_path(text)


def not_empty(name: str, kind: Callable[[str], Any] = _path) -> Any:
    """What typer calls with the text of a path; an empty one would be the working directory.

    Args:
        name: Name of the option or argument, for the error message.
        kind: Function that makes the value of the text.
    """

    def parse(text: str | Path) -> Any:
        if not str(text):
            raise UserError(f"{name}: empty; give a path.")
        return kind(str(text))

    return parse


def path_option(name: str, help: str, *more: str, kind: Callable[[str], Any] = _path, **settings: Any) -> Any:
    """An option for a path.

    Args:
        name: Name of the option.
        help: Meaning of the option.
        *more: Further names.
        kind: Function that makes the value of the text.
        **settings: Further arguments of `typer.Option`.
    """
    return typer.Option(name, *more, help=help, parser=not_empty(name, kind), metavar="PATH", **settings)


Out = Annotated[Path, path_option("--out", "Folder that receives the result.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")]
Model = Annotated[str, typer.Option("--model", help="Name in MLflow's registry (MLFLOW_TRACKING_URI).")]
DEFAULT_MODEL: str = INPUTS["registered_model"].default


def recipe_names() -> list[str]:
    """The shipped recipes, for a shell that completes one."""
    from minicpmv_finetune.inputs.recipe import RECIPES

    return list(RECIPES)


def recipe_option(**settings: Any) -> Any:
    """The option for a recipe.

    Args:
        **settings: Further arguments of `typer.Option`.
    """
    text = (
        "Recipe that contains inputs: one that `minicpmv-finetune recipes` lists, or a YAML file. Inputs given by "
        "themselves have priority, in a JSON object key by key."
    )
    return typer.Option(
        "--recipe",
        "--parameters",
        help=text,
        autocompletion=recipe_names,
        parser=not_empty("--recipe", str),
        metavar="NAME_OR_PATH",
        show_default=False,
        **settings,
    )


Check = Callable[[Sequence[Input], Mapping[str, Any]], dict[str, Any]]
First = Callable[[Mapping[str, Any], Mapping[str, Any]], None]


def check_whole_run(inputs: Sequence[Input], given: Mapping[str, Any], trains_here: bool = True) -> dict[str, Any]:
    """`check_run`, whose modules are imported when it is called."""
    from minicpmv_finetune.inputs.checks import check_run

    return check_run(inputs, given, trains_here=trains_here)


def with_inputs(
    inputs: Iterable[Input],
    required: Iterable[str] = (),
    check: Check = check_inputs,
    first: First | None = None,
    recipe: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these inputs in place of its parameter `inputs`.

    The command receives their values by name, parsed and checked.

    Args:
        inputs: Rows of the table.
        required: Names of inputs whose default does not apply to this command.
        check: Function that checks the values of the inputs and returns them in their types.
        first: Function of the given inputs and the command's own options that is called before `check`.
        recipe: Whether the command also takes inputs from a recipe, by `--recipe`.
    """
    rows = tuple(inputs)
    needed = set(required)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def checked(**options: Any) -> None:
            given = _from_json(rows, {row.name: options.pop(row.name) for row in rows})
            context, name = options.pop("context", None), options.pop("recipe", None)
            typed = rows
            if name:
                from minicpmv_finetune.inputs.recipe import recipe_for

                recipe_inputs = recipe_for(name, rows)
                typed = tuple(row for row in rows if row.name not in recipe_inputs or _is_typed(row.name, context))
                given = _over_recipe(recipe_inputs, given, context)
            if first:
                first(given, options)
            with _mistakes_name_options(typed):
                given |= check(rows, given)
            command(inputs=given, **options)

        parameters = list(_RECIPE_PARAMETERS) if recipe else []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "inputs":
                parameters += [_parameter(row, row.name in needed) for row in rows]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        # Typer reads both attributes.
        checked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        checked.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return checked

    return decorate


def _require_less(context: typer.Context, name: str | None) -> str | None:
    """Let a recipe contain an input that is required: typer asks for options before the command is called."""
    if name:
        from minicpmv_finetune.inputs.recipe import read_recipe

        required = [row.name for row in INPUTS.values() if row.default is REQUIRED]
        found = {key: value for key, value in read_recipe(name).items() if key in required}
        context.default_map = {**(context.default_map or {}), **found}
    return name


_RECIPE_PARAMETERS = (
    inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, recipe_option(callback=_require_less, is_eager=True)],
    ),
)


def _over_recipe(recipe: Mapping[str, Any], options: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """The inputs of the recipe, those given as options over them, and defaults for the others."""
    from minicpmv_finetune.inputs.recipe import over_recipe

    given = {name: value for name, value in options.items() if _is_typed(name, context)}
    return {**options, **over_recipe(recipe, given)}


def _is_typed(name: str, context: typer.Context) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _mistakes_name_options(rows: Iterable[Input]) -> Iterator[None]:
    """Let sentences about mistakes in these inputs begin with what is typed: --data, not data_uri."""
    options = {row.name: _option(row) for row in rows}
    try:
        yield
    except MistakesError as error:
        parts = [sentence.partition(":") for sentence in error.sentences]
        raise MistakesError([f"{options.get(name, name)}{colon}{rest}" for name, colon, rest in parts]) from error


def _option(row: Input) -> str:
    return row.option or f"--{row.name.replace('_', '-')}"


def _parameter(row: Input, is_required: bool) -> inspect.Parameter:
    is_json = row.type is dict
    named = [row.option] if row.option else []
    text = f"As JSON: {row.help[0].lower()}{row.help[1:]}" if is_json else row.help
    info = typer.Option(*named, help=text, rich_help_panel=row.group.capitalize())
    default: Any = json.dumps(row.default) if is_json else row.default
    if is_required or row.default is REQUIRED:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        row.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[str if is_json else row.type, info],
    )


def _from_json(inputs: Iterable[Input], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every JSON object parsed, so that the message about a mistake names the option."""
    objects = {row.name: _option(row) for row in inputs if row.type is dict}
    return {name: read_json_object(value, objects[name]) if name in objects else value for name, value in given.items()}


def read_json_object(text: str, option: str) -> dict[str, Any]:
    """The JSON object in an option's text.

    Raises:
        UserError: The text is not a JSON object, or has a key twice.
    """
    try:
        value = read_json(text, option)
    except ValueError as error:
        raise UserError(f"{option}: invalid JSON ({error}); write it like '{{\"name\": 1}}'.") from error
    if not isinstance(value, dict):
        raise UserError(f"{option}: must be a JSON object; write it like '{{\"name\": 1}}'.")
    return value


def reported(command: Callable[..., Mapping[str, Any]]) -> Callable[..., None]:
    """Give a command --quiet and --output; what it returns is the document of `--output json`.

    With a document, what the command prints goes to stderr, so that stdout contains the document and nothing else.
    """

    @wraps(command)
    def shown(*, quiet: bool, output: Output, **options: Any) -> None:
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(_quiet())
                stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            elif output == "json":
                stack.enter_context(redirect_stdout(sys.stderr))
            answer = command(**options)
        if output == "json":
            print(json.dumps(answer, indent=1, ensure_ascii=False))

    more = {"quiet": (Quiet, False), "output": (OutputFormat, "text")}
    parameters = [
        *inspect.signature(command).parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in more.items()
        ),
    ]
    shown.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    shown.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return shown


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the steps of this process and of those that it starts show neither progress nor outcomes, for a block."""
    before = environment.QUIET.read()
    os.environ[environment.QUIET.name] = "1"
    try:
        yield
    finally:
        os.environ[environment.QUIET.name] = before


def absolute(uri: str) -> str:
    """The absolute path of a local file, because steps may run in another folder; URIs and hub ids are unchanged."""
    is_path = uri and "://" not in uri and _path(uri).exists()
    return str(_path(uri).absolute()) if is_path else uri


def text_table(rows: list[dict[str, Any]]) -> str:
    """A text table with the keys as headings; each column is as wide as its widest cell."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
