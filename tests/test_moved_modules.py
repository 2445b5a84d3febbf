"""Module names of 0.1.0 still work, because compiled pipelines and launch scripts contain them."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicpmv_finetune import errors, pipelines
from minicpmv_finetune.moved_modules import MOVED

COMPILED = sorted((Path(__file__).parent / "published").glob("*/pipelines/*.yaml"))
_IMPORT = re.compile(r"from (minicpmv_finetune[\w.]*) import (\((?:[^)]*)\)|[^;\n]*)")


@pytest.fixture(autouse=True)
def _restore_pipelines() -> Iterator[None]:
    """Undo that importing the old module `pipelines.finetune` hides the pipeline of the same name."""
    yield
    for name in ("finetune", "retrain"):
        vars(pipelines).pop(name, None)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_leads_to_the_module_itself(old: str) -> None:
    moved = importlib.import_module(f"minicpmv_finetune.{old}")
    assert moved is importlib.import_module(f"minicpmv_finetune.{MOVED[old]}")
    assert moved.__name__ == f"minicpmv_finetune.{MOVED[old]}"
    assert moved.__spec__ is not None
    assert moved.__spec__.name == moved.__name__


def test_an_error_raised_under_an_old_name_is_caught_under_the_new_one() -> None:
    from minicpmv_finetune.components.errors import UserError  # type: ignore[import-not-found]

    assert UserError is errors.UserError


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_all_imports_of_a_compiled_pipeline_exist(path: Path) -> None:
    import yaml

    document = next(yaml.safe_load_all(path.read_text()))
    sources = [
        word
        for executor in document["deploymentSpec"]["executors"].values()
        for word in executor["container"]["command"]
        if "minicpmv_finetune" in word
    ]
    found = [(module, names) for source in sources for module, names in _IMPORT.findall(source)]
    assert len(found) >= 20
    for module, names in found:
        for name in names.strip("()").split(","):
            if name := name.split(" as ")[0].strip():
                assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


def test_python_runs_a_module_by_its_old_name() -> None:
    command = [sys.executable, "-m", "minicpmv_finetune.components.train.node"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "trainjob_pod.py" in done.stderr
