"""The wheel that draws charts and vector images, without a browser."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .registries import Package

VL_CONVERT = Package(
    "PyPI",
    "vl-convert-python",
    "BSD-3-Clause",
    "1.9.0.post1",
    (
        "3c1558fa0055e88c465bd3d71760cde9fa2c94a95f776a0ef9178252fd820b1f",  # x86_64
        "e6ecfe4b7e2ea9e8c30fd6d6eaea3ef85475be1ad249407d9796dce4ecdb5b32",  # aarch64
    ),
)


def drawing_library(packages: Mapping[str, Path]) -> Any:
    """The module of the wheel, which a task fetches under the name `drawing`."""
    sys.path.insert(0, str(packages["drawing"]))
    return importlib.import_module("vl_convert")
