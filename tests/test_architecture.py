"""The arrows of docs/architecture.md: which module may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("components/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
STEPS = {"validate_data", "preprocess", "train", "merge", "evaluate", "register", "plan_retraining", "notify"}


def _imports(module: Path) -> list[str]:
    """Dotted names from the repository's root, relative imports resolved, wherever they stand in the file."""
    package = module.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [name.removeprefix("minicpmv_finetune.") for name in found]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_arrows_point_one_way(module: Path) -> None:
    parts = module.relative_to(ROOT).parts
    for name in _imports(module):
        target = name.split(".")
        if parts[0] == "components":
            assert target[0] != "pipelines", f"imports {name}"
            if target[0] == "kfp":
                assert parts[-1] == "component.py", f"imports {name}"
            if target[0] == "components" and target[1] in STEPS:
                assert parts[1] == target[1], f"imports {name}"
        if parts[:2] == ("components", "minicpmv") and target[0] == "components":
            assert target[1] not in STEPS, f"imports {name}"
