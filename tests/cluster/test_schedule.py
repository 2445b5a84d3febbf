"""Recurring runs as code, on a server that cannot change a recurring run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune.inputs.table import defaults
from minicpmv_finetune.kubeflow.schedule import describe_time, to_six_fields
from minicpmv_finetune.pipelines.retraining import RETRAIN
from tests.cluster.commands import BASE_MODEL, INPUTS, Command
from tests.cluster.fake_kubeflow import FakeKubeflow

Write = Callable[..., Path]


@pytest.fixture
def schedules(tmp_path: Path) -> Write:
    """A function that writes a file with one schedule, with some fields changed, and others."""

    def write(*others: dict[str, Any], **change: Any) -> Path:
        schedule = {
            "name": "nightly",
            "cron": "0 3 * * 1-5",
            "parameters": {"data_uri": "s3://bucket/train.json", "base_model_uri": BASE_MODEL},
        }
        path = tmp_path / "schedules.yaml"
        path.write_text(yaml.safe_dump({"schedules": [{**schedule, **change}, *others]}))
        return path

    return write


def _apply(command: Command, file: Path, *words: str) -> list[str]:
    """Apply the schedules in a file, and return what happened to each."""
    done = command("schedule", "apply", "-f", file, "--output", "json", *words)
    assert done.code == 0, done.err
    return [change["verb"] for change in done.json]


def test_apply_creates_a_schedule_once(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    assert _apply(command, schedules(), "--dry-run") == ["create"]
    assert kubeflow.recurring_runs == {}
    assert kubeflow.pipelines == {}
    assert _apply(command, schedules()) == ["create"]
    (created,) = kubeflow.recurring_runs.values()
    assert created["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1-5"
    assert (created["no_catchup"], created["max_concurrency"], created["status"]) == (True, "1", "ENABLED")
    assert created["service_account"] == "minicpmv-finetune"
    before = dict(kubeflow.recurring_runs)
    kubeflow.requests.clear()
    assert _apply(command, schedules()) == ["keep"]
    assert kubeflow.recurring_runs == before
    assert all(line.startswith("GET") for line in kubeflow.requests)


def test_a_schedule_takes_its_parameters_from_a_recipe_too(
    kubeflow: FakeKubeflow, command: Command, schedules: Write, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("lora_r: 7\nseed: 7\ntraining_flags: {save_steps: 7, weight_decay: 0.5}\n")
    parameters = {"data_uri": "s3://bucket/train.json", "base_model_uri": BASE_MODEL, "seed": 8}
    mine = schedules(recipe="mine.yaml", parameters={**parameters, "training_flags": {"save_steps": 9}})
    assert _apply(command, mine) == ["create"]
    (created,) = kubeflow.recurring_runs.values()
    sent = created["runtime_config"]["parameters"]
    assert sent["seed"] == 8
    # Retraining has no input for the rank.
    assert sent["training_flags"] == {"lora_r": 7, "save_steps": 9, "weight_decay": 0.5}
    assert _apply(command, mine) == ["keep"]
    shipped = schedules(recipe="2.6-80gb", parameters=parameters)
    assert _apply(command, shipped) == ["replace"]
    assert "no_such: neither a recipe nor a file" in command("schedule", "apply", "-f", schedules(recipe="no_such")).err


def test_a_schedule_sends_every_default_that_its_version_knows(
    kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    def sent() -> dict[str, Any]:
        (created,) = kubeflow.recurring_runs.values()
        return dict(created["runtime_config"]["parameters"])

    given = {"data_uri": "s3://bucket/train.json", "base_model_uri": BASE_MODEL}
    assert _apply(command, schedules()) == ["create"]
    assert sent() == {**defaults(RETRAIN.inputs), **given}
    # Another program's version is the newest one now, and has no input `seed`.
    newest = max(kubeflow.versions.values(), key=lambda version: version["created_at"])
    spec = json.loads(json.dumps(newest["pipeline_spec"]))
    del spec.get("pipeline_spec", spec)["root"]["inputDefinitions"]["parameters"]["seed"]
    version = {**newest, "pipeline_version_id": "other", "display_name": "other", "created_at": kubeflow.now()}
    kubeflow.versions["other"] = {**version, "pipeline_spec": spec}
    for chosen in ("latest", "other"):
        kubeflow.recurring_runs.clear()
        assert _apply(command, schedules(version=chosen)) == ["create"]
        assert "seed" not in sent()
        assert sent()["metric"] == defaults(RETRAIN.inputs)["metric"]


@pytest.mark.parametrize(
    "change",
    [
        {"cron": "0 4 * * 1-5"},
        {"parameters": {"data_uri": "s3://bucket/other.json", "base_model_uri": BASE_MODEL}},
        {"no_catchup": False},
        {"max_concurrency": 2},
        {"description": "for the demo"},
        {"mlflow_experiment": "receipts"},
        {"pipeline": "finetune"},
    ],
)
def test_a_schedule_that_differs_is_replaced(
    change: dict[str, Any], kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    _apply(command, schedules())
    (old,) = kubeflow.recurring_runs
    assert _apply(command, schedules(**change), "--dry-run") == ["replace"]
    assert list(kubeflow.recurring_runs) == [old]
    assert _apply(command, schedules(**change)) == ["replace"]
    (new,) = kubeflow.recurring_runs
    assert new != old
    assert _apply(command, schedules(**change)) == ["keep"]


def test_latest_uses_the_newest_version_at_every_tick(
    kubeflow: FakeKubeflow, command: Command, schedules: Write, profile: Callable[..., Path]
) -> None:
    _apply(command, schedules(pipeline="finetune"))
    (schedule,) = kubeflow.recurring_runs
    first = kubeflow.tick(schedule)
    command("submit", *INPUTS, "--profile", profile(labels={"environment": "new"}))
    second = kubeflow.tick(schedule)
    assert first
    assert second
    assert first["pipeline_version_reference"] != second["pipeline_version_reference"]
    assert _apply(command, schedules(pipeline="finetune")) == ["keep"]


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({}, "minicpmv-retrain"),
        ({"pipeline": "retrain"}, "minicpmv-retrain"),
        ({"pipeline": "finetune"}, "minicpmv-finetune"),
    ],
)
def test_the_default_pipeline_is_retrain(
    choice: dict[str, Any], name: str, kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    _apply(command, schedules(**choice))
    (created,) = kubeflow.recurring_runs.values()
    (pipeline,) = kubeflow.pipelines.values()
    assert pipeline["display_name"] == name
    assert created["pipeline_version_reference"]["pipeline_id"] == pipeline["pipeline_id"]


def test_inputs_are_checked_for_the_schedules_pipeline(
    kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    parameters = {"data_uri": "s3://bucket/train.json", "base_model_uri": BASE_MODEL, "num_train_epochs": 1}
    assert command("schedule", "apply", "-f", schedules(parameters=parameters)).code == 2
    assert _apply(command, schedules(parameters=parameters, pipeline="finetune")) == ["create"]


def test_current_uses_the_same_version_at_every_tick(
    kubeflow: FakeKubeflow, command: Command, schedules: Write, profile: Callable[..., Path]
) -> None:
    _apply(command, schedules(version="current", pipeline="finetune"))
    (schedule,) = kubeflow.recurring_runs
    first = kubeflow.tick(schedule)
    command("submit", *INPUTS, "--profile", profile(labels={"environment": "new"}))
    second = kubeflow.tick(schedule)
    assert first
    assert second
    assert first["pipeline_version_reference"] == second["pipeline_version_reference"]
    unknown = command("schedule", "apply", "-f", schedules(version="v1"))
    assert unknown.code == 2
    assert "no version v1" in unknown.err


def test_duplicates_are_reduced_to_one(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    _apply(command, schedules())
    ((kept, record),) = kubeflow.recurring_runs.items()
    kubeflow.recurring_runs["copy"] = {**record, "recurring_run_id": "copy", "created_at": kubeflow.now()}
    kubeflow.recurring_runs["other"] = {**record, "recurring_run_id": "other", "description": "by hand"}
    assert _apply(command, schedules()) == ["delete", "delete", "keep"]
    assert list(kubeflow.recurring_runs) == [kept]


def test_a_schedule_created_by_hand_is_replaced_by_name(
    kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    _apply(command, schedules())
    (record,) = kubeflow.recurring_runs.values()
    record["description"] = ""
    assert _apply(command, schedules()) == ["replace"]
    assert len(kubeflow.recurring_runs) == 1


def test_other_schedules_are_left_alone(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    _apply(command, schedules())
    _apply(command, schedules(name="weekly"))
    assert sorted(item["display_name"] for item in kubeflow.recurring_runs.values()) == ["nightly", "weekly"]


def test_after_a_failed_replacement_the_old_schedule_is_enabled(
    kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    _apply(command, schedules())
    (old,) = kubeflow.recurring_runs
    kubeflow.answer_next(r"POST .*/recurringruns$", 500)
    assert command("schedule", "apply", "-f", schedules(cron="0 4 * * *")).code == 75
    assert list(kubeflow.recurring_runs) == [old]
    assert kubeflow.recurring_runs[old]["status"] == "ENABLED"
    assert _apply(command, schedules(cron="0 4 * * *")) == ["replace"]


def test_pause_and_resume(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    _apply(command, schedules())
    (created,) = kubeflow.recurring_runs.values()
    assert command("schedule", "pause", "nightly", "--dry-run", "--output", "json").json["changed"] is True
    assert created["status"] == "ENABLED"
    assert command("schedule", "pause", "nightly", "--output", "json").json["changed"] is True
    assert command("schedule", "pause", "nightly", "--output", "json").json["changed"] is False
    assert kubeflow.tick(created["recurring_run_id"]) is None
    assert _apply(command, schedules()) == ["keep"]
    assert created["status"] == "DISABLED"
    assert command("schedule", "resume", "nightly", "--output", "json").json["changed"] is True
    assert created["status"] == "ENABLED"
    unknown = command("schedule", "pause", "hourly")
    assert unknown.code == 2
    assert "hourly" in unknown.err


def test_a_pause_survives_a_replacement(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    _apply(command, schedules())
    command("schedule", "pause", "nightly")
    _apply(command, schedules(cron="0 4 * * *"))
    (created,) = kubeflow.recurring_runs.values()
    assert created["status"] == "DISABLED"


def test_the_file_can_pause_and_resume(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    _apply(command, schedules(paused=True))
    (created,) = kubeflow.recurring_runs.values()
    assert created["status"] == "DISABLED"
    assert _apply(command, schedules(paused=False)) == ["resume"]
    assert created["status"] == "ENABLED"
    assert _apply(command, schedules(paused=True)) == ["pause"]


def test_delete_by_name_and_by_file(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    file = schedules()
    _apply(command, file)
    assert command("schedule", "delete", "nightly", "--dry-run", "--output", "json").json == {"nightly": True}
    assert len(kubeflow.recurring_runs) == 1
    assert command("schedule", "delete", "-f", file, "--output", "json").json == {"nightly": True}
    assert kubeflow.recurring_runs == {}
    assert "does not exist" in command("schedule", "delete", "nightly").out
    assert command("schedule", "delete").code == 2


def test_list_shows_the_times_in_words(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    assert command("schedule", "list").out == "no schedules\n"
    done = command("schedule", "apply", "-f", schedules())
    assert "At 03:00, Monday through Friday, in the server's time zone (UTC)" in done.out
    (row,) = command("schedule", "list", "--output", "json").json
    assert (row["name"], row["enabled"], row["cron"], row["version"]) == ("nightly", True, "0 0 3 * * 1-5", "latest")
    assert "in the server's time zone (UTC)" in command("schedule", "list").out


def test_a_user_without_access_to_the_namespace_is_refused(
    kubeflow: FakeKubeflow, command: Command, schedules: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.tokens.update({"mine": {"minicpmv-finetune"}, "other": {"elsewhere"}})
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "other")
    assert command("schedule", "apply", "-f", schedules()).code == 2
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "mine")
    assert _apply(command, schedules()) == ["create"]
    assert len(command("schedule", "list", "--output", "json").json) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cron": "0 3 * *"}, "4 fields"),
        ({"cron": "0 3 * * 7"}, "between 0 and 6"),
        ({"cron": "0 25 * * *"}, "between 0 and 23"),
        ({"cron": "0 3 * * */0"}, "between 0 and 6"),
        ({"parameters": {"data_urri": "s3://b/x"}}, "did you mean data_uri"),
        ({"max_concurrency": 11}, "less than or equal to 10"),
        ({"no_catch_up": True}, "no_catch_up"),
        ({"pipeline": "retrian"}, "pipeline"),
        ({"version": "current", "mlflow_experiment": "receipts"}, "the server drops the parameters"),
    ],
)
def test_the_message_about_a_mistake_names_its_place(
    change: dict[str, Any], message: str, kubeflow: FakeKubeflow, command: Command, schedules: Write
) -> None:
    done = command("schedule", "apply", "-f", schedules(**change))
    assert done.code == 2
    assert message in done.err
    assert kubeflow.recurring_runs == {}


def test_two_schedules_with_one_name_are_refused(kubeflow: FakeKubeflow, command: Command, schedules: Write) -> None:
    duplicate = {"name": "nightly", "cron": "0 0 * * *", "parameters": {}}
    done = command("schedule", "apply", "-f", schedules(duplicate))
    assert done.code == 2
    assert "two schedules have the name nightly" in done.err


@pytest.mark.parametrize("content", [None, "schedules", "- 1", "a: ["])
def test_a_file_without_schedules_is_refused_in_one_sentence(
    content: str | None, kubeflow: FakeKubeflow, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "schedules.yaml"
    if content is not None:
        path.write_text(content)
    done = command("schedule", "apply", "-f", path)
    assert done.code == 2
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("0 3 * * 1-5", "0 0 3 * * 1-5"),
        ("*/15 * * * *", "0 */15 * * * *"),
        ("0 0 3 1,15 JAN-MAR ?", "0 0 3 1,15 JAN-MAR ?"),
    ],
)
def test_five_fields_get_the_second_zero(given: str, sent: str) -> None:
    assert to_six_fields(given) == sent
    assert to_six_fields(sent) == sent


def test_described_times_name_the_time_zone_and_are_not_converted() -> None:
    assert describe_time("0 30 22 * * 0", "Europe/Berlin") == (
        "At 22:30, only on Sunday, in the server's time zone (Europe/Berlin)"
    )
