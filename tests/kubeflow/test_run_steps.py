"""The steps of recorded runs: one row a step, whatever else the server lists."""

import pytest

from minicpmv_finetune.kubeflow.run_steps import (
    list_steps,
    node_id,
    pod_name,
    step_of_path,
    waiting_since,
    workflow_name,
)
from tests.kubeflow.recorded import read, read_run

PIPELINE = ["validate-data", "preprocess", "train", "merge", "evaluate", "register"]
PARTS = ["validate-data", "preprocess-part[0]", "preprocess-part[1]", *PIPELINE[1:-1]]


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        ("digits-1", PIPELINE),
        ("kill-1", PIPELINE[:-1]),
        ("retrain-2", ["validate-data", "plan-retraining", "notify"]),
        ("retrain-bad", ["validate-data", "notify"]),
        ("partitions", PARTS),
        ("retried-by-hand", ["validate-data"]),
        ("training", PIPELINE[:3]),
    ],
)
def test_a_run_has_its_steps_and_nothing_that_kubeflow_adds(run: str, steps: list[str]) -> None:
    assert [row.step for row in list_steps(read_run(run))] == steps


def test_a_pod_that_argo_started_again_is_another_attempt() -> None:
    rows = {row.step: row for row in list_steps(read_run("kill-1"))}
    assert (rows["train"].attempts, rows["train"].state, rows["train"].seconds) == (2, "SUCCEEDED", 456)
    assert rows["train"].pod == "minicpmv-finetune-48tlf-2347858134"
    assert rows["merge"].attempts == 1


def test_states_are_those_of_the_newest_attempt() -> None:
    assert [row.state for row in list_steps(read_run("retrain-bad"))] == ["FAILED", "SUCCEEDED"]
    assert [row.state for row in list_steps(read_run("training"))] == ["SUCCEEDED", "SUCCEEDED", "RUNNING"]


def test_a_step_whose_pod_has_not_started_is_pending_though_the_server_says_running() -> None:
    run = read_run("waiting")
    assert {row.step: row.state for row in list_steps(run)} == dict.fromkeys(("gpu", "nosecret", "noimage"), "PENDING")
    since = waiting_since(run)
    assert since is not None
    assert since.isoformat() == "2026-11-26T02:44:33+00:00"
    assert waiting_since(read_run("training")) is None


def test_a_driver_appears_only_if_it_failed() -> None:
    (row,) = list_steps(read_run("no-service-account"))
    assert (row.step, row.state, row.attempts) == ("root-driver", "FAILED", 3)


def test_a_run_without_tasks_has_no_steps() -> None:
    run = read_run("digits-1", run_details=None)
    assert (list_steps(run), workflow_name(run)) == ([], "")


def test_the_names_of_pods_follow_from_the_pipeline_and_the_nodes_path() -> None:
    path = "minicpmv-finetune-48tlf(0).root(0).train(0).executor(1)"
    node = node_id("minicpmv-finetune-48tlf", path)
    name = "minicpmv-finetune-48tlf-metadata-0-3-retry-system-container-impl-2347858134"
    assert pod_name(node, read("version"), "train") == name
    assert pod_name(node, {}, "train") == node
    assert pod_name(
        "a-1", {"root": {"dag": {"tasks": {"s": {"componentRef": {"name": "c"}}}}}, "components": {"c": {}}}, "s"
    ) == ("a-system-container-impl-1")


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("w(0).root(0).train(0).executor(1)", "train"),
        ("w(0).root(0).evaluate-driver(0)", "evaluate"),
        ("w(0).root(0).exit-handler-1.onExit(0).notify(0).executor(0)", "notify"),
        (
            "w(0).root(0).for-loop-2(0).iteration-iterations(1:1)(0).iteration-item(0).preprocess-part(0)",
            "preprocess-part[1]",
        ),
    ],
)
def test_a_nodes_path_names_its_step(path: str, step: str) -> None:
    assert step_of_path(path) == step
