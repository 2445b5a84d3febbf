"""The pipeline for schedules: compiled, and run on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.pipelines.local import run_pipeline
from minicpmv_finetune.pipelines.retraining import RETRAIN
from minicpmv_finetune.pipelines.summary import print_summary
from minicpmv_finetune.tracking.registry import open_registry
from tests.servers import Webhook
from tests.warm_processes import warm_steps

Documents = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    path = RETRAIN.write(tmp_path_factory.mktemp("compiled") / "retrain.yaml")
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform


def test_every_step_is_a_task(compiled: Documents) -> None:
    assert set(compiled[0]["deploymentSpec"]["executors"]) == {
        f"exec-{step}" for step in RETRAIN.steps if step != "preprocess-part"
    }


def test_the_webhook_comes_from_an_optional_secret(compiled: Documents) -> None:
    pipeline, platform = compiled
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-notify"]
    (secret,) = executor["secretAsEnv"]
    assert secret["optional"] is True
    assert secret["keyToEnv"] == [{"envVar": "MINICPMV_FINETUNE_WEBHOOK_URL", "secretKey": "url"}]
    assert not any("webhook" in name for name in pipeline["root"]["inputDefinitions"]["parameters"])
    assert pipeline["root"]["dag"]["tasks"]["notify"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


@pytest.fixture
def inputs(tiny_46: Path, digits: Path, tmp_path: Path, database: Path) -> dict[str, object]:
    for split, count in {"train": 16, "eval": 6}.items():
        samples = json.loads((digits / f"{split}.json").read_text())[:count]
        for sample in samples:
            sample["image"] = str(digits / sample["image"])
        (tmp_path / f"{split}.json").write_text(json.dumps(samples))
    return {
        "data_uri": str(tmp_path / "train.json"),
        "eval_data_uri": str(tmp_path / "eval.json"),
        "base_model_uri": str(tiny_46),
        "registered_model": "digits",
        "training_flags": {
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "lora_r": 2,
            "learning_rate": 1e-3,
        },
        # A score equal to the base model's is enough here.
        "evaluation_options": {"max_new_tokens": 2, "gate": {"min_improvement": -1}},
    }


def test_new_data_makes_a_champion_and_the_same_data_does_nothing(
    inputs: dict[str, object], tmp_path: Path, webhook: Webhook, capsys: pytest.CaptureFixture[str]
) -> None:
    with warm_steps():
        first = run_pipeline(tmp_path / "run", inputs, pipeline=RETRAIN)
    assert list(first.seconds) == list(RETRAIN.steps)
    champion = open_registry("digits").champion()
    assert champion is not None
    assert Path(champion.uri) == first.output("merge", "model")
    assert Path(champion.adapter_uri) == first.output("train", "adapter")
    assert champion.base_model == inputs["base_model_uri"]
    assert "Training loss over the steps" in first.output("evaluate", "evaluation_report").read_text()

    with warm_steps():
        again = run_pipeline(tmp_path / "run", inputs, pipeline=RETRAIN)
    assert list(again.seconds) == ["validate-data", "plan-retraining", "notify"]
    for run, has_scores in ((first, True), (again, False)):
        capsys.readouterr()
        print_summary(run, tmp_path / "run")
        shown = capsys.readouterr().out
        assert ("exact_match" in shown) == ("\n  gate " in shown) == has_scores
        assert "\n  merged model " in shown
    promoted, nothing_new = webhook.received
    assert promoted["state"] == nothing_new["state"] == "SUCCEEDED"
    assert promoted["outcome"] == "version 1 of digits is champion: as good as the base model"
    assert nothing_new["outcome"] == "nothing new: version 1 of digits was tuned on this data"


def test_a_failed_run_is_reported_to_the_webhook(inputs: dict[str, object], tmp_path: Path, webhook: Webhook) -> None:
    Path(str(inputs["data_uri"])).write_text("[")
    with warm_steps(), pytest.raises(UserError):
        run_pipeline(tmp_path / "run", inputs, pipeline=RETRAIN)
    (message,) = webhook.received
    assert message["state"] == "FAILED"
    assert message["run"].startswith("minicpmv-retrain-")
