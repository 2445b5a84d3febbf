"""The layers of docs/architecture.md: which room may import which, and which libraries are imported where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minicpmv_finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))
STEPS = ("validate_data", "preprocess", "train", "merge", "evaluate", "register", "plan_retraining", "notify")
# From the lowest to the highest; a room imports only from layers below its own.
LAYERS = (
    ("moved_modules", "terminal"),
    ("errors", "environment"),
    ("cores", "cpu_memory"),
    (
        "container_images",
        "kubernetes_terms",
        "git_commit",
        "storage",
        "progress",
        "workers",
        "process_tree",
        "options",
        "yaml_files",
    ),
    ("run_records", "outputs", "fork_server"),
    ("permanent_errors",),
    ("data",),
    ("minicpmv",),
    ("shards", "tracking"),
    ("reports", "attempts", "estimate"),
    ("serving",),
    tuple(f"components/{step}" for step in STEPS),
    ("inputs",),
    ("component.py",),
    ("pipelines",),
    ("kubeflow",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MAY_IMPORT_KFP = ("component.py", "pipelines", "kubeflow")
# Where tensors are; and preflight looks whether a container image sees a GPU.
MAY_IMPORT_TORCH = (
    "minicpmv",
    *(f"components/{step}" for step in ("preprocess", "train", "merge", "evaluate")),
    "kubeflow",
)


def _room(parts: tuple[str, ...]) -> str:
    """The room of a module or package, by its path below the package; the steps' interfaces to Kubeflow are one."""
    if parts[0] == "components" and parts[2:3] == ("component",):
        return "component.py"
    return "/".join(parts[:2]) if parts[0] == "components" and len(parts) > 1 else parts[0]


def _imports(module: Path) -> list[tuple[str, ...]]:
    """What a module imports, wherever the import stands in it, as parts of absolute names."""
    package = ("minicpmv_finetune", *module.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            found += [(*base, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_a_room_imports_only_from_layers_below_its_own(module: Path) -> None:
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",) or parts == ("components", "__init__"):
        return
    room = _room(parts)
    for name in _imports(module):
        if name[0] == "minicpmv_finetune":
            target = _room(name[1:])
            is_lower = target == room or LEVEL[target] < LEVEL[room]
            # `from minicpmv_finetune.pipelines import finetune` is published, and gives a pipeline with settings.
            is_published = parts == ("pipelines", "__init__") and target == "kubeflow"
            assert is_lower or is_published, f"{room} imports {'.'.join(name)}"
            if room == "component.py" and name[1] == "components":
                assert name[2] == parts[1], f"the interface of {parts[1]} imports {'.'.join(name)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_libraries_are_imported_in_their_rooms_only(module: Path) -> None:
    path = module.relative_to(PACKAGE)
    libraries = {name[0] for name in _imports(module)}
    if "kfp" in libraries:
        assert path.name in MAY_IMPORT_KFP or path.parts[0] in MAY_IMPORT_KFP
    if "torch" in libraries:
        assert _room(path.with_suffix("").parts) in (*MAY_IMPORT_TORCH, "pipelines")


def test_every_room_has_a_layer() -> None:
    rooms = {_room(module.relative_to(PACKAGE).with_suffix("").parts) for module in MODULES}
    assert rooms - {"__init__", "components", "components/__init__"} == set(LEVEL)


def test_components_holds_the_steps_and_nothing_else() -> None:
    assert {path.name for path in (PACKAGE / "components").iterdir() if (path / "component.py").exists()} == set(STEPS)
    assert {path.stem for path in (PACKAGE / "components").glob("*.py")} == {"__init__"}


def test_links_at_the_top_level_lead_to_the_rooms() -> None:
    for name in ("components", "pipelines"):
        link = PACKAGE.parent / name
        assert not link.exists() or link.resolve() == PACKAGE / name


def test_environment_variables_are_read_in_one_place() -> None:
    for module in MODULES:
        if module.name == "environment.py":
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            is_item = (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Load)
                and ast.unparse(node.value) == "os.environ"
            )
            is_test = isinstance(node, ast.Compare) and "os.environ" in map(ast.unparse, node.comparators)
            if is_call or is_item or is_test:
                pytest.fail(f"{module.relative_to(PACKAGE)} reads the environment: {ast.unparse(node)}")


def test_imports_are_absolute_across_rooms_and_relative_within() -> None:
    for module in MODULES:
        package = module.relative_to(PACKAGE).parts[:-1]
        # A component's body is copied into the compiled pipeline, where nothing is relative.
        if not package or module.name == "component.py" or package == ("components",):
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom):
                own = ".".join(("minicpmv_finetune", *package))
                place = f"{module.relative_to(PACKAGE)}:{node.lineno}"
                assert node.level <= 1, f"{place}: write an absolute import"
                assert node.level or not f"{node.module}.".startswith(f"{own}."), f"{place}: write a relative import"


def test_importing_components_takes_no_torch() -> None:
    code = """
import sys
from importlib import import_module
for step in sys.argv[1:]:
    import_module(f"minicpmv_finetune.components.{step}.component")
    if "torch" in sys.modules:
        sys.exit(f"{step} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code, *STEPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
