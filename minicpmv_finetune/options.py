"""Values that a user gives by name: their types and ranges, and a step's options as one JSON object.

A JSON object of options fits in a single field of a run form. Every message names the option, and all mistakes in an
object are reported at once.
"""

import dataclasses
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import MistakesError, UserError

Settings = TypeVar("Settings")
_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a JSON object"}


@dataclass(frozen=True)
class Accepted:
    """Which values of its type an option accepts; by default all.

    Attributes:
        choices: The accepted texts; empty accepts all.
        at_least: Smallest value.
        above: Bound that the value must exceed.
        at_most: Largest value.
        below: Bound that the value must stay under.
        also: A value that is accepted although it is out of range, such as -1 for "not set".
    """

    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: float | None = None

    def remedy(self, value: Any) -> str:
        """What to give instead of a value that is not accepted; empty if it is accepted."""
        if self.choices and value not in self.choices:
            return f"{did_you_mean(str(value), self.choices)}choose one of {', '.join(self.choices)}"
        if self.also is not None and value == self.also:
            return ""
        also = "" if self.also is None else f", or {self.also:g}"
        if self.at_least is not None and not value >= self.at_least:
            return f"give at least {self.at_least:.10g}{also}"
        if self.above is not None and not value > self.above:
            return f"give more than {self.above:.10g}{also}"
        if self.at_most is not None and not value <= self.at_most:
            return f"give at most {self.at_most:.10g}{also}"
        if self.below is not None and not value < self.below:
            return f"give less than {self.below:.10g}{also}"
        if isinstance(value, float) and not math.isfinite(value):
            return "give a finite number"
        return ""


ANY = Accepted()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean NAME? ` with the known name that is most like a word; empty if none is alike."""
    names = list(known)
    longer = [name for name in names if len(word) > 2 and name.startswith(word)]
    close = longer or difflib.get_close_matches(word, names, 1)
    return f"did you mean {close[0]}? " if close else ""


def parse_value(name: str, value: Any, kind: type, accepted: Accepted = ANY) -> Any:
    """A value in its option's type; text is read as JSON where the type is not str.

    Args:
        name: Name of the option, for the message.
        value: What was given. Kubeflow passes every number of a JSON object as a float, so 2.0 is a whole number.
        kind: str, int, float, bool or dict.
        accepted: Range or choices of the option.

    Raises:
        UserError: The value has another type or is not accepted.
    """
    if isinstance(value, str) and kind is not str:
        try:
            value = read_json(value.lower() if kind is bool else value, name)
        except ValueError:
            raise _wrong_type(name, value, kind) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(name, value, kind)
    if remedy := accepted.remedy(value):
        raise UserError(f"{name}: {value!r} is not accepted; {remedy}.")
    return value


def read_json(text: str, name: str) -> Any:
    """The value that JSON contains.

    Args:
        text: The JSON.
        name: Name of the option, for the message.

    Raises:
        ValueError: The text is not JSON.
        UserError: An object has a key twice, of which Python itself keeps the last.
    """

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if doubled := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise UserError(f"{name}: has {doubled[0]!r} twice; keep one.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=as_object)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _wrong_type(name: str, value: Any, kind: type) -> UserError:
    return UserError(f"{name}: {value!r} is not {_TYPE_NAMES[kind]}; correct it.")


def raise_mistakes(sentences: Sequence[str]) -> None:
    """Raise one error that names all mistakes, if there are any.

    Raises:
        MistakesError: There is at least one sentence.
    """
    if sentences:
        raise MistakesError(sentences)


def settings_from_options(kind: type[Settings], options: Mapping[str, Any], name: str) -> Settings:
    """The settings that a JSON object names; every other setting has its default.

    Args:
        kind: Dataclass of the settings. A field's type is one of `parse_value`'s, or another dataclass; it may allow
            None, and `Annotated` with an `Accepted`.
        options: The JSON object.
        name: Name of the input that contains the object, for the error message.

    Raises:
        UserError: A name is unknown, or a value has another type or is not accepted; all mistakes at once.
    """
    mistakes: list[str] = []
    settings = _read_settings(kind, options, "", mistakes)
    raise_mistakes([f"{name}: {mistake}" for mistake in mistakes])
    return settings


def check_settings(settings: Any) -> None:
    """Check the values of a dataclass by its fields' `Annotated` types.

    Raises:
        UserError: Values have another type or are not accepted; all mistakes at once.
    """
    mistakes: list[str] = []
    for field, hint in _fields(type(settings)).items():
        _read_value(field, getattr(settings, field), hint, mistakes)
    raise_mistakes(mistakes)


def _read_settings(kind: type[Any], options: Mapping[str, Any], prefix: str, mistakes: list[str]) -> Any:
    """The settings; None after a mistake, which is added to the list."""
    fields = _fields(kind)
    values = {}
    before = len(mistakes)
    for name, value in options.items():
        if name in fields:
            values[name] = _read_value(f"{prefix}{name}", value, fields[name], mistakes)
        else:
            mistakes.append(f"{prefix}{name}: unknown; {did_you_mean(name, fields)}known are {', '.join(fields)}.")
    if len(mistakes) > before:
        return None
    try:
        return kind(**values)
    except UserError as error:  # values that contradict each other
        mistakes.append(f"{prefix}{error}")
        return None


def _fields(kind: type[Any]) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _read_value(name: str, value: Any, hint: Any, mistakes: list[str]) -> Any:
    accepted = ANY
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        accepted = next((extra for extra in extras if isinstance(extra, Accepted)), ANY)
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        hint, accepted = str, Accepted(get_args(hint))
    try:
        if not dataclasses.is_dataclass(hint):
            return parse_value(name, value, hint, accepted)
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return _read_settings(hint, parse_value(name, value, dict), f"{name}.", mistakes)  # type: ignore[arg-type]
    except UserError as error:
        mistakes.append(str(error))
        return None
