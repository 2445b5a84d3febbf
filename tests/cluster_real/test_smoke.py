"""The smoke part, at most 15 minutes on two cores: each way to start a run, and each way in which it can end."""

from typing import Any

import kfp
import pytest

from tests.cluster_real.conftest import SMALL, RealCluster, eventually

STEPS = ("validate-data", "preprocess", "train", "merge", "evaluate")


def test_preflight_is_green(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    inputs = ("--data", digits_in_store["data_uri"], "--base-model", digits_in_store["base_model_uri"])
    done = cluster.command("preflight", "--gpus", "0", *inputs)
    assert done.code == 0, done.out


def test_a_run_goes_through(cluster: RealCluster, trained: str) -> None:
    steps = cluster.steps(trained)
    assert {step: steps[step]["state"] for step in STEPS} == dict.fromkeys(STEPS, "SUCCEEDED")
    assert cluster.state(trained) == "SUCCEEDED"


def test_a_named_run_is_not_started_twice(cluster: RealCluster, trained: str, digits_in_store: dict[str, str]) -> None:
    again = cluster.submit("trained", {**digits_in_store, **SMALL}, wait=False)
    assert (again.json["run_id"], again.json["started"]) == (trained, False)


def test_logs_are_read_while_the_pod_is_there(cluster: RealCluster, trained: str) -> None:
    done = cluster.command("logs", trained, "--step", "train")
    assert done.code == 0, done.err
    assert "loss" in done.out


def test_a_mistake_ends_with_its_sentence(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    missing = f"{cluster.store}/data/none.json"
    run = cluster.start_unchecked("mistake", {**digits_in_store, **SMALL, "data_uri": missing})
    eventually(lambda: cluster.state(run) == "FAILED", 600)
    row = cluster.steps(run)["validate-data"]
    assert row["state"] == "FAILED"
    assert "none.json" in row["message"]


def test_a_mistake_that_is_seen_from_here_starts_nothing(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    missing = f"data_uri={cluster.store}/data/none.json"
    done = cluster.command("submit", "--gpus", "0", "--experiment", cluster.experiment, "-p", missing)
    assert done.code == 2
    assert "none.json" in done.err


def test_a_failed_gate_is_no_failed_run(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    # Two steps with a tiny learning rate teach nothing, so the base model is as good.
    flags = {**SMALL["training_flags"], "max_steps": 2}
    done = cluster.submit("gate", {**digits_in_store, **SMALL, "learning_rate": 1e-9, "training_flags": flags})
    assert done.code == 0, done.out + done.err
    assert cluster.state(cluster.runs[-1]) == "SUCCEEDED"
    assert cluster.steps(cluster.runs[-1]).get("register", {}).get("state") != "SUCCEEDED"


def test_cancel_ends_the_pods(cluster: RealCluster, digits_in_store: dict[str, str]) -> None:
    cluster.submit("cancelled", {**digits_in_store, **SMALL, "seed": 2}, wait=False)
    run = cluster.runs[-1]
    eventually(lambda: cluster.pods(run, "validate-data"), 300)
    assert cluster.command("cancel", run).code == 0
    eventually(lambda: cluster.state(run) in {"CANCELED", "FAILED"}, 300)
    running = [pod for pod in cluster.pods(run, "validate-data") if pod["status"]["phase"] == "Running"]
    assert not running


@pytest.mark.filterwarnings("ignore:This client only works")
def test_the_sdk_starts_a_run(
    cluster: RealCluster, digits_in_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.profile import chosen_profile, with_profile
    from minicpmv_finetune.pipelines import finetune

    client: kfp.Client = connect(chosen_profile()).client
    arguments: dict[str, Any] = {**digits_in_store, **SMALL, "seed": 3}
    result = client.create_run_from_pipeline_func(
        with_profile(finetune, chosen_profile().with_gpus(0)),
        arguments=arguments,
        experiment_name=cluster.experiment,
        service_account=chosen_profile().service_account,
    )
    cluster.runs.append(result.run_id)
    assert result.wait_for_run_completion(timeout=1200).state == "SUCCEEDED"
