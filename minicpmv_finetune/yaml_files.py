"""YAML files that a person writes: training flags, profiles, schedules and inputs."""

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


def read_mapping(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """The content of a YAML file that contains a mapping.

    Args:
        path: The file.
        expected: What the mapping contains, for the error message.
        remedy: What to do about a wrong file, for the error message.

    Raises:
        UserError: The file cannot be read, is not YAML, has a key twice, or contains something else.
    """
    try:
        with path.open("rb") as file:
            content = _Loader(file).get_single_data()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-30
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split()):.300}); {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a YAML mapping of {expected}; {remedy}.")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which the safe loader itself keeps the last."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"has the key {key.value!r} twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return node
