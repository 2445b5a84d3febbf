import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.pipeline import Pipeline
from minicpmv_finetune.pipelines.retraining import RETRAIN


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = FINETUNE.write(tmp_path_factory.mktemp("compiled") / "pipeline.yaml")
    document: dict[str, Any] = next(iter(yaml.safe_load_all(path.read_text())))
    return document


def dags(compiled: dict[str, Any]) -> list[dict[str, Any]]:
    """Every component that contains tasks."""
    return [compiled["root"], *(component for component in compiled["components"].values() if "dag" in component)]


def test_every_step_is_a_task(compiled: dict[str, Any]) -> None:
    tasks = [name for component in dags(compiled) for name in component["dag"]["tasks"]]
    groups = ("condition-", "exit-handler-")
    assert {name for name in tasks if not name.startswith(groups)} == set(FINETUNE.steps)


def test_the_end_of_a_run_is_reported_whatever_happened(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    assert tasks["notify"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert set(tasks) - {"notify"} == {"exit-handler-1"}


def test_only_a_model_that_passes_the_gate_is_registered(compiled: dict[str, Any]) -> None:
    tasks = [item for component in dags(compiled) for item in component["dag"]["tasks"].items()]
    (condition,) = [task for name, task in tasks if name.startswith("condition-")]
    assert condition["triggerPolicy"]["condition"].endswith("== 'promote'")
    assert list(compiled["components"][condition["componentRef"]["name"]]["dag"]["tasks"]) == ["register"]


def test_inputs_are_few_documented_and_have_defaults(compiled: dict[str, Any]) -> None:
    inputs = compiled["root"]["inputDefinitions"]["parameters"]
    assert len(inputs) <= 20
    assert all(len(item["description"]) > 15 for item in inputs.values())
    assert [name for name, item in inputs.items() if "defaultValue" not in item and not item.get("isOptional")] == [
        "data_uri"
    ]
    assert inputs["use_lora"]["defaultValue"] is True


@pytest.mark.parametrize("pipeline", [FINETUNE, RETRAIN], ids=["finetune", "retrain"])
def test_names_in_the_description_are_code(pipeline: Pipeline) -> None:
    # Elsewhere the UI takes a part between two underscores for emphasis, and removes them.
    assert "_" not in re.sub(r"`[^`]*`", "", pipeline.guide)


def test_every_component_input_is_documented(compiled: dict[str, Any]) -> None:
    own = {name: component for name, component in compiled["components"].items() if "dag" not in component}
    for name, component in own.items():
        for kind in ("parameters", "artifacts"):
            for key, item in component["inputDefinitions"].get(kind, {}).items():
                assert item.get("description"), f"{name}: {key}"


def test_nothing_is_installed_at_run_time(compiled: dict[str, Any]) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_compiling_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minicpmv_finetune.pipelines.finetuning import FINETUNE; "
        f"FINETUNE.write(Path({str(tmp_path / 'p.yaml')!r})); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
