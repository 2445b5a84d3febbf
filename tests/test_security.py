"""Calls and imports that no module may contain, because they run content from outside as code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("minicpmv_finetune", "images") for path in ROOT.glob(f"{folder}/**/*.py"))
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def find_violations(source: str) -> list[str]:
    """The imports and calls in a module's source that can run content from outside as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(name)
            if name == "torch.load" and words.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            found += [word for word in ("shell", "trust_remote_code") if words.get(word, "False") != "False"]
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_no_module_runs_content_from_outside_as_code(module: Path) -> None:
    assert find_violations(module.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "yaml.load(file)",
        "torch.load(path)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=given)",
    ],
)
def test_a_violation_is_found(source: str) -> None:
    assert find_violations(source)
