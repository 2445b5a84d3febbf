"""The type checker of `make check` sees through every package: it reports a wrong call wherever one is written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIPELINE_MODULE = Path("minicpmv_finetune/pipelines/local.py")
COMPONENTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("minicpmv_finetune/components/*/component.py"))
CALLED = ("minicpmv_finetune/storage/__init__.py", "minicpmv_finetune/storage/uris.py")
WRONG_CALL = ["    from minicpmv_finetune import storage as planted", "    planted.join(1, 2, 3)"]


def plant_wrong_call(source: str) -> str:
    """Insert a wrong call of the library before the last statement of the first function."""
    lines = source.splitlines()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    last = function.body[-1].lineno - 1
    return "\n".join([*lines[:last], *WRONG_CALL, *lines[last:]]) + "\n"


def test_wrong_calls_in_a_pipeline_and_in_every_component_are_reported(tmp_path: Path) -> None:
    modules = [str(path) for path in (PIPELINE_MODULE, *COMPONENTS)]
    # `make types` follows every import; here the package that is called is enough, in seconds instead of minutes.
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "skip"]
    command += [*CALLED, *modules]
    for number, module in enumerate(modules):
        shadow = tmp_path / f"{number}.py"
        shadow.write_text(plant_wrong_call((ROOT / module).read_text()))
        command += ["--shadow-file", module, str(shadow)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    reported = re.findall(r'(?m)^(.*?):\d+: error: Too many arguments for "join"', done.stdout)
    assert sorted(reported) == sorted(modules), done.stdout
