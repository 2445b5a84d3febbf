"""The decision whether a scheduled run has new data, and where its training starts."""

from pathlib import Path

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.components.plan_retraining.planning import plan, plan_retraining
from minicpmv_finetune.data.samples import DATASET_FILE, DatasetInfo
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.run_records import Outcome
from minicpmv_finetune.tracking import step_runs
from minicpmv_finetune.tracking.promotion_record import PromotionRecord
from minicpmv_finetune.tracking.registry import open_registry

FLAGS = {"lora_r": 4}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    info = DatasetInfo(fingerprint="of the new data", rows={"train": 1, "eval": 1}, rejected={})
    (folder / DATASET_FILE).write_text(info.model_dump_json())
    return folder


def promote(fingerprint: str, adapter_uri: str = "s3://adapters/1") -> None:
    registry = open_registry("model")
    record = PromotionRecord(
        promote=True,
        reason="better",
        model_uri="s3://models/1",
        adapter_uri=adapter_uri,
        base_model="base",
        generation="4.6",
        data_fingerprint=fingerprint,
        metric="exact_match",
        metrics={},
    )
    registry.promote(registry.register(record).number, "", "better")


def test_without_a_champion_the_data_is_new(database: Path, dataset: Path) -> None:
    assert plan_retraining(dataset, "base", "model", "champion", FLAGS) == (True, FLAGS)


def test_the_plan_says_why(database: Path, dataset: Path) -> None:
    assert plan(dataset, "base", "model", "champion", FLAGS).sentence == (
        "the data is new, training starts from the base model"
    )


def test_the_champions_data_is_not_new(database: Path, dataset: Path) -> None:
    promote("of the new data")
    assert plan_retraining(dataset, "base", "model", "base", FLAGS) == (False, FLAGS)
    assert step_runs.read_outcome() == Outcome(
        result="nothing new", sentence="nothing new: version 1 of model was tuned on this data"
    )


def test_training_may_continue_from_the_champions_adapter(database: Path, dataset: Path) -> None:
    promote("of older data")
    assert plan_retraining(dataset, "base", "model", "base", FLAGS) == (True, FLAGS)
    assert plan_retraining(dataset, "base", "model", "champion", FLAGS) == (
        True,
        {**FLAGS, "lora_weight_path": "s3://adapters/1"},
    )
    with pytest.raises(UserError, match="was tuned from base, not from another"):
        plan_retraining(dataset, "another", "model", "champion", FLAGS)


def test_training_cannot_continue_from_a_champion_without_adapter(database: Path, dataset: Path) -> None:
    promote("of older data", adapter_uri="")
    with pytest.raises(UserError, match="has no adapter"):
        plan_retraining(dataset, "base", "model", "champion", FLAGS)


@pytest.mark.parametrize(("name", "start", "words"), [("", "base", "registered_model"), ("model", "best", "'best'")])
def test_invalid_arguments_are_named(database: Path, dataset: Path, name: str, start: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_retraining(dataset, "base", name, start, FLAGS)


def test_without_mlflow_nothing_is_trained_again_and_again(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.TRACKING_URI.name, raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: not set, so there is no champion"):
        plan_retraining(dataset, "base", "model", "base", FLAGS)


def test_a_server_that_is_down_is_an_error_before_any_training(
    dataset: Path, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, unreachable)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RetryableError):
        plan_retraining(dataset, "base", "model", "base", FLAGS)
