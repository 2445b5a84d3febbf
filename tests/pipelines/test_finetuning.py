import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from minicpmv_finetune.cli import main
from minicpmv_finetune.pipelines.finetuning import STEPS, compile_pipeline, finetune


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path = compile_pipeline(tmp_path_factory.mktemp("compiled") / "pipeline.yaml")
    return next(iter(yaml.safe_load_all(path.read_text())))


def dags(compiled: dict) -> list[dict]:
    return [compiled["root"], *(component for component in compiled["components"].values() if "dag" in component)]


def test_every_step_is_a_task(compiled: dict) -> None:
    tasks = [name for component in dags(compiled) for name in component["dag"]["tasks"]]
    assert {name for name in tasks if not name.startswith("condition-")} == set(STEPS)


def test_only_what_passes_the_gate_is_registered(compiled: dict) -> None:
    (condition,) = [task for name, task in compiled["root"]["dag"]["tasks"].items() if name.startswith("condition-")]
    assert condition["triggerPolicy"]["condition"].endswith("== 'promote'")
    assert list(compiled["components"][condition["componentRef"]["name"]]["dag"]["tasks"]) == ["register"]


def test_inputs_are_few_documented_and_have_defaults(compiled: dict) -> None:
    inputs = compiled["root"]["inputDefinitions"]["parameters"]
    assert len(inputs) <= 20
    assert all(len(item["description"]) > 15 for item in inputs.values())
    assert [name for name, item in inputs.items() if "defaultValue" not in item and not item.get("isOptional")] == [
        "data_uri"
    ]
    assert inputs["use_lora"]["defaultValue"] is True


def test_every_component_input_is_documented(compiled: dict) -> None:
    own = {name: component for name, component in compiled["components"].items() if "dag" not in component}
    for name, component in own.items():
        for kind in ("parameters", "artifacts"):
            for key, item in component["inputDefinitions"].get(kind, {}).items():
                assert item.get("description"), f"{name}: {key}"


def test_nothing_is_installed_at_run_time(compiled: dict) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_compiling_takes_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minicpmv_finetune.pipelines.finetuning import compile_pipeline; "
        f"compile_pipeline(Path({str(tmp_path / 'p.yaml')!r})); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_offers_every_pipeline_input_with_its_default() -> None:
    renamed = {"data": "data_uri", "eval_data": "eval_data_uri", "base_model": "base_model_uri"}
    options = inspect.signature(main.run).parameters
    offered = {
        renamed.get(name, name): option.default for name, option in options.items() if name not in {"out", "runner"}
    }
    for name in ("training_flags", "data_options", "evaluation_options"):
        offered[name] = main.read_flags(offered[name])
    wanted = {
        name: parameter.default for name, parameter in inspect.signature(finetune.pipeline_func).parameters.items()
    }
    assert offered == wanted


def test_every_command_has_help_worth_reading() -> None:
    for command in main.app.registered_commands:
        assert command.callback is not None
        assert len(inspect.getdoc(command.callback) or "") > 30
        for name, parameter in inspect.signature(command.callback).parameters.items():
            option = getattr(parameter.annotation, "__metadata__", [None])[0]
            assert parameter.annotation is typer.Context or option.help, name
