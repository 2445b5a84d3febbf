"""YAML files that a person writes: profiles, schedules and inputs."""

from pathlib import Path
from typing import Any

import yaml

from minicpmv_finetune.errors import UserError


def read_mapping(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """The content of a YAML file that contains a mapping.

    Args:
        path: The file.
        expected: What the mapping contains, for the error message.
        remedy: What to do about a wrong file, for the error message.

    Raises:
        UserError: The file cannot be read, is not YAML, or contains something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split()):.200}); {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a YAML mapping of {expected}; {remedy}.")
    return content
