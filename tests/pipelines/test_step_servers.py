"""Steps without torch wait for none of its imports, and a run without steps that need it does not import it."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.pipelines import step_servers
from minicpmv_finetune.pipelines.local_steps import RunSteps
from minicpmv_finetune.pipelines.run_display import RunDisplay
from minicpmv_finetune.pipelines.step_servers import FIRST_IMPORTS, StepServers


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that prints whether what stands for torch is imported, which takes until there is a file."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_servers, "FIRST_IMPORTS", ("json",))
    monkeypatch.setattr(step_servers, "TORCH_IMPORTS", ("like_torch",))
    (tmp_path / "like_torch.py").write_text("import os, time\nwhile not os.path.exists('go'): time.sleep(0.02)\n")
    (tmp_path / "program.py").write_text("import sys; print('like_torch' in sys.modules)\n")
    return "program"


def has_torch(program: str, servers: StepServers, step: str, is_stopped: bool = False) -> bool:
    with servers.of(step, lambda: is_stopped).start(program, [], os.environ, leads_tree=True) as process:
        assert process.stdout
        return process.stdout.read() == "True\n"


def test_a_step_without_torch_runs_while_torch_is_imported(program: str) -> None:
    with StepServers(["validate-data", "train", "register"]) as servers:
        assert not has_torch(program, servers, "validate-data")
        assert not has_torch(program, servers, "train", is_stopped=True), "a run that is stopped does not wait"
        assert not has_torch(program, servers, "register")
        Path("go").touch()
        assert has_torch(program, servers, "train")


def test_torch_is_imported_only_for_a_step_that_needs_it(program: str) -> None:
    Path("go").touch()
    with StepServers(["validate-data", "notify"]) as servers:
        for step in ("validate-data", "preprocess", "plan-retraining", "register", "notify"):
            assert not has_torch(program, servers, step)
        assert servers._with_torch is None
        assert has_torch(program, servers, "train"), "one that was not expected"


def test_what_all_steps_import_is_small() -> None:
    large = {"torch", "transformers", "peft", "pandas", "sklearn"}
    code = f"import sys, {', '.join(FIRST_IMPORTS)}; print({large} & set(sys.modules), 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() True\n"


def test_a_failure_at_the_end_of_tracking_is_shown_and_logged(
    unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv(environment.PLUGIN_RUN_ID.name, raising=False)
    monkeypatch.setenv(environment.TRACKING_URI.name, unreachable)
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "digits")
    shown, log = StringIO(), StringIO()
    folder: Any = None
    with RunDisplay(log, to=shown) as display, StepServers([]) as servers:
        RunSteps(folder, display, lock=0, servers=servers).end_tracking("FINISHED")
    for text in (shown, log):
        assert text.getvalue().count("warning: MLflow tracking is incomplete") == 1
