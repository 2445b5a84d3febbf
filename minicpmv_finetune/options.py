"""A step's options as one JSON object: what a run form can hold in a single field."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import UserError, first_complaint

Settings = TypeVar("Settings")


def settings_from_options(kind: type[Settings], options: Mapping[str, Any], name: str, known: str) -> Settings:
    """The settings that a JSON object names; what it does not name has its default.

    Args:
        kind: dataclass of the settings, which forbids what it does not have.
        options: the object.
        name: of the input that holds it.
        known: what may stand there, for the sentence.

    Raises:
        UserError: a name is unknown, or its value of another type.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        raise UserError(f"{name}: {first_complaint(error)}; known are {known}.") from error
