"""The registry with a real MLflow server, whose artifacts are stored on a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from minicpmv_finetune import environment, storage
from minicpmv_finetune.components.register.register import register
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.run_records import Outcome
from minicpmv_finetune.tracking import step_runs
from minicpmv_finetune.tracking.promotion_record import PromotionRecord, write_promotion_record
from minicpmv_finetune.tracking.registry import (
    OvertakenError,
    Registry,
    champion_to_beat,
    link_to_champion,
    link_to_newest,
    list_versions,
    open_registry,
)
from tests.faults.network_relay import start_relay
from tests.servers import MlflowServer

RACE = Path(__file__).with_name("promotion_race.py")


def record_of(uri: str, champion: str = "", promote: bool = True) -> PromotionRecord:
    return PromotionRecord(
        promote=promote,
        reason="12.0 points better than the base model",
        champion=champion,
        model_uri=uri,
        adapter_uri=f"{uri}-adapter",
        base_model="base",
        generation="4.6",
        data_fingerprint="0123abcd",
        metric="exact_match",
        metrics={"tuned_exact_match": 0.75},
    )


@pytest.fixture
def name(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a registered model that does not exist yet."""
    monkeypatch.setenv(environment.TRACKING_URI.name, mlflow_server.uri)
    monkeypatch.delenv(environment.PLUGIN_RUN_ID.name, raising=False)
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, f"run-{uuid.uuid4().hex}")
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def registry(name: str) -> Registry:
    return open_registry(name)


def aliased(registry: Registry, alias: str) -> str:
    return str(MlflowClient().get_model_version_by_alias(registry.name, alias).version)


def registered(registry: Registry, count: int) -> list[str]:
    return [registry.register(record_of(f"s3://models/{number}")).number for number in range(count)]


def test_a_model_is_registered_by_its_address_with_its_facts(registry: Registry) -> None:
    assert registry.champion() is None
    version = registry.register(record_of("minio://models/a"))
    assert (version.uri, version.adapter_uri) == ("s3://models/a", "s3://models/a-adapter")
    entry = MlflowClient().get_model_version_by_alias(registry.name, "challenger")
    assert entry.source == "s3://models/a"
    tags = {key.removeprefix("minicpmv."): value for key, value in entry.tags.items()}
    assert (tags["generation"], tags["base_model"], tags["data_fingerprint"]) == ("4.6", "base", "0123abcd")
    assert json.loads(tags["metrics"]) == {"tuned_exact_match": 0.75}
    assert registry.register(record_of("s3://models/a")) == version, "a retry finds the version"
    assert registry.register(record_of("s3://models/b")).number == "2"
    assert aliased(registry, "challenger") == "2"


def test_local_folders_can_be_registered(registry: Registry, tmp_path: Path) -> None:
    assert registry.register(record_of(str(tmp_path))).uri == str(tmp_path)


def test_a_promotion_is_valid_only_over_the_champion_it_was_decided_on(registry: Registry) -> None:
    first, second, third = registered(registry, 3)
    registry.promote(first, "", "the first")
    assert aliased(registry, "champion") == first
    registry.promote(second, first, "better")
    with pytest.raises(OvertakenError, match="the champion is version 2 now"):
        registry.promote(third, first, "better than a former champion")
    champion = registry.champion()
    assert champion is not None
    assert champion.number == aliased(registry, "champion") == second
    assert [(move.version, move.previous, move.reason) for move in registry.moves()] == [
        (first, "", "the first"),
        (second, first, "better"),
    ]
    tags = MlflowClient().get_model_version(registry.name, first).tags
    assert tags["minicpmv.champion"] == "promotion: the first"
    assert tags["minicpmv.replaced_by"] == "promotion of version 2: better"


@pytest.mark.parametrize("created_by", ["this version", "0.1.0"])
def test_the_log_of_moves_says_what_it_is(registry: Registry, created_by: str) -> None:
    client, log = MlflowClient(), f"{registry.name}.moves"
    if created_by == "0.1.0":
        client.create_registered_model(log, description=f"Every move of the champion of {registry.name}, in order.")
    (first,) = registered(registry, 1)
    registry.promote(first, "", "the first")
    description = client.get_registered_model(log).description
    assert description.startswith(f"This is not a model but the log of the champions of {registry.name}")
    assert log in client.get_registered_model(registry.name).description


def test_a_retried_promotion_is_done_once(registry: Registry) -> None:
    first, second = registered(registry, 2)
    move = registry.promote(first, "", "the first", claim="run 1")
    assert registry.promote(first, "", "the first", claim="run 1") == move
    registry.promote(second, first, "better", claim="run 2")
    assert registry.promote(first, "", "the first", claim="run 1") == move, "also after a later promotion"
    assert aliased(registry, "champion") == second
    again = registry.promote(first, second, "better after all", claim="run 3")
    assert aliased(registry, "champion") == first
    assert registry.promote(first, first, "a tie", claim="run 4") == again, "the version is champion already"


def test_rollback_goes_back_one_champion_at_a_time(registry: Registry) -> None:
    first, second, third = registered(registry, 3)
    for number in (first, second, third):
        registry.promote(number, None, "by hand")
    assert registry.rollback("wrong answers").version == second
    assert registry.rollback("wrong answers too").version == first
    assert aliased(registry, "champion") == first
    with pytest.raises(UserError, match="no champion came before"):
        registry.rollback("one more")
    assert registry.promote(third, None, "fixed").previous == first
    assert registry.rollback("not fixed").version == first


def test_a_champion_set_before_the_log_began_is_the_one_to_beat(registry: Registry) -> None:
    first, second = registered(registry, 2)
    MlflowClient().set_registered_model_alias(registry.name, "champion", first)
    with pytest.raises(OvertakenError):
        registry.promote(second, "", "better than the base model")
    registry.promote(second, first, "better")
    assert registry.rollback("back").version == first


def test_an_outdated_alias_is_corrected(registry: Registry) -> None:
    first, second = registered(registry, 2)
    registry.promote(first, "", "the first")
    registry.promote(second, first, "better")
    MlflowClient().set_registered_model_alias(registry.name, "champion", first)
    champion = registry.champion()
    assert champion is not None
    assert champion.number == aliased(registry, "champion") == second


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.faults_only)])
def test_of_concurrent_promotions_one_succeeds(count: int, registry: Registry, mlflow_server: MlflowServer) -> None:
    first, *racing = registered(registry, 1 + count)
    registry.promote(first, "", "the first")
    command = [sys.executable, str(RACE), mlflow_server.uri, registry.name, first, *racing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = dict(json.loads(done.stdout))
    assert len(outcomes) == count, done.stderr
    winners = [number for number, outcome in outcomes.items() if outcome == "promoted"]
    assert len(winners) == 1, outcomes
    assert [move.version for move in registry.moves()] == [first, winners[0]]
    assert aliased(registry, "champion") == winners[0]


def test_the_register_step_promotes_and_tags_its_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/a"))
    assert register(tmp_path / "promotion_record", name) == (
        f"version 1 of {name} is champion: 12.0 points better than the base model"
    )
    client = MlflowClient()
    experiment = client.get_experiment_by_name("minicpmv-finetune")
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id],
        f"tags.`minicpmv.pipeline_run` = '{os.environ[environment.PIPELINE_RUN_ID.name]}' and "
        "tags.`minicpmv.task` = 'register'",
    )
    assert run.data.tags["minicpmv.version"] == "1"
    assert "is champion" in run.data.tags["minicpmv.promotion"]
    assert client.get_model_version(name, "1").run_id == run.info.run_id
    assert step_runs.read_outcome() == Outcome(result="promoted", sentence=run.data.tags["minicpmv.promotion"])
    page = f"{os.environ['MLFLOW_TRACKING_URI']}/#"
    for link in (link_to_newest, link_to_champion):
        assert link(name) == f"\n[Version 1 in MLflow]({page}/models/{name}/versions/1)\n"
    address = f"{page}/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    assert step_runs.link_to_run("register") == f"\n[This step in MLflow]({address})\n"
    assert step_runs.link_to_run("train") == ""
    assert step_runs.link_to_run().startswith(f"\n[This run in MLflow]({page}/experiments/")
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/b"))
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "a later run")
    assert "stays challenger: it was compared with no champion, but the champion is version 1 now" in register(
        tmp_path / "promotion_record", name
    )


def test_without_a_name_nothing_is_registered_and_said(tmp_path: Path) -> None:
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/a"))
    sentence = register(tmp_path / "promotion_record", "")
    assert sentence == "passed the gate, but it is not registered, because registered_model is empty"
    assert link_to_newest("") == ""


def test_a_model_that_failed_the_gate_is_not_registered(name: str, tmp_path: Path) -> None:
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/a", promote=False))
    with pytest.raises(UserError, match="did not pass the gate"):
        register(tmp_path / "promotion_record", name)


def test_the_champion_can_be_fetched_from_its_address(registry: Registry, s3_uri: str) -> None:
    storage.write_bytes(f"{s3_uri}/model/config.json", b"{}")
    registry.promote(registry.register(record_of(f"{s3_uri}/model")).number, "", "the first")
    champion = registry.champion()
    assert champion is not None
    assert (storage.fetch(champion.uri) / "config.json").read_bytes() == b"{}"


def test_a_champion_whose_folder_is_gone_is_a_user_error(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    version = registry.register(record_of(str(tmp_path / "model")))
    registry.promote(version.number, "", "the first")
    assert champion_to_beat(registry.name) == version
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="its folder is gone"):
        champion_to_beat(registry.name)
    assert champion_to_beat("") is None


def test_a_registration_can_be_retried_after_the_server_was_down(
    tmp_path: Path, mlflow_server: MlflowServer, unreachable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, unreachable)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    port = int(unreachable.rpartition(":")[2])
    with pytest.raises(RetryableError, match="does not answer") as raised:
        open_registry(name)
    assert raised.value.exit_code == 75
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/a"))
    with pytest.raises(RetryableError):
        register(tmp_path / "promotion_record", name)
    with start_relay(mlflow_server.uri, port):
        assert "is champion" in register(tmp_path / "promotion_record", name)
    with pytest.raises(RetryableError):
        register(tmp_path / "promotion_record", name)
    with start_relay(mlflow_server.uri, port):
        assert "version 1 " in register(tmp_path / "promotion_record", name)
        assert len(open_registry(name).moves()) == 1


def test_errors_do_not_show_the_servers_password(unreachable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv(environment.TRACKING_URI.name, unreachable.replace("//", "//user:hidden@"))
    with pytest.raises(RetryableError) as raised:
        open_registry("model")
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "a/b", "a'b", "..", "a" * 251])
def test_names_that_mlflow_cannot_store_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot name a model"):
        open_registry(name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"promote": "perhaps"}'])
def test_a_file_that_is_no_promotion_record_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "record").write_text(content)
    with pytest.raises(UserError, match="record: not a promotion record"):
        register(tmp_path / "record", "model")


def test_versions_of_one_model_and_of_all_models(registry: Registry) -> None:
    registered(registry, 2)
    client = MlflowClient()
    assert [str(version.version) for version in list_versions(client, registry.name)] == ["1", "2"]
    assert list_versions(client, f"{registry.name}-without-versions") == []
    sources = [version.source for version in list_versions(client) if version.name == registry.name]
    assert sources == ["s3://models/0", "s3://models/1"]


def test_without_a_server_there_is_no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(environment.TRACKING_URI.name, raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        open_registry("model")
    write_promotion_record(tmp_path / "promotion_record", record_of("s3://models/a"))
    assert "it is not registered" in register(tmp_path / "promotion_record", "model")
