"""A step's options as one JSON object, which fits in a single field of a run form."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import UserError, describe_validation_error

Settings = TypeVar("Settings")


def settings_from_options(kind: type[Settings], options: Mapping[str, Any], name: str, known: str) -> Settings:
    """The settings that a JSON object names; every other setting has its default.

    Args:
        kind: Dataclass of the settings, which forbids unknown fields.
        options: The JSON object.
        name: Name of the input that contains the object, for the error message.
        known: Names of the settings and their values, for the error message.

    Raises:
        UserError: A name is unknown, or its value has another type.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        raise UserError(f"{name}: {describe_validation_error(error)}; known are {known}.") from error
