"""The second half of the tutorial, typed as it is on the page, with a tiny base model in the store and no GPU.

The commands get what a cluster without GPU and hub needs, and names and places of this suite; everything else is as the
page has it.
"""

import json
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml

from tests.cluster_real.conftest import SMALL, RealCluster, as_text, eventually
from tests.docs import tutorial

KUBEFLOW = tutorial.section("On Kubeflow")
NAME = "shapes-1"


@pytest.fixture
def files(digits: Path, tmp_path: Path) -> Path:
    """A folder with the digits in the place of the shapes, so that nothing is fetched."""
    data = tmp_path / "build" / "public" / "easy-vqa-300" / "data"
    data.parent.mkdir(parents=True)
    data.symlink_to(digits)
    for name, origin in (("train.jsonl", "train.json"), ("test-scores.jsonl", "eval.json")):
        rows = json.loads((digits / origin).read_text())
        (digits / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_its_second_half_can_be_typed(
    cluster: RealCluster, digits_in_store: dict[str, str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    base = digits_in_store["base_model_uri"]
    given = {**SMALL, "base_model_uri": base}
    inputs = [word for name, value in given.items() for word in ("-p", f"{name}={as_text(value)}")]
    added = {
        "upload": ["--to", f"{cluster.store}/tutorial"],
        "preflight": ["--gpus", "0", "--base-model", base],
        "compile": ["--gpus", "0"],
        "submit": ["--gpus", "0", "--experiment", cluster.experiment, *inputs],
    }
    run = f"{NAME}-{cluster.word}"
    variables: dict[str, str] = {}
    for line in tutorial.typed(KUBEFLOW):
        program, *words = line.with_values(variables)
        # Exports are the caller's, and so is whether this cluster gets MLflow.
        if program == "export" or words[0] in ("setup", "schedule"):
            continue
        words = [run if word == NAME else word for word in words]
        done = cluster.command(*words, *added.get(words[0], []))
        assert done.code == 0, (words, done.out, done.err)
        if words[0] == "submit":
            rows = cluster.command("runs", "--experiment", cluster.experiment, "--output", "json").json
            cluster.runs += [row["run_id"] for row in rows if row["name"] == run]
        if line.variable:
            variables[line.variable] = done.out.strip()
    assert cluster.state(cluster.runs[-1]) == "SUCCEEDED"


def test_its_schedule_is_applied_and_deleted(
    cluster: RealCluster, digits_in_store: dict[str, str], tmp_path: Path
) -> None:
    content = yaml.safe_load(tutorial.block(KUBEFLOW, "yaml"))
    (schedule,) = content["schedules"]
    schedule |= {"name": f"shapes-{cluster.word}", "experiment": cluster.experiment, "paused": True}
    schedule["parameters"] |= {name: digits_in_store[name] for name in ("data_uri", "base_model_uri")}
    file = tmp_path / "schedules.yaml"
    file.write_text(yaml.safe_dump(content))
    for line in tutorial.typed(tutorial.section("On a schedule")):
        _, *words = line.words
        words = [schedule["name"] if word == "shapes-nightly" else word for word in words]
        if words[:2] == ["schedule", "apply"]:
            words = ["schedule", "apply", "-f", str(file), "--gpus", "0"]
            cluster.schedules.append(schedule["name"])
        done = cluster.command(*words)
        if done.code != 0 and "mlflow" in done.err.lower():
            cluster.schedules.remove(schedule["name"])
            pytest.skip("the profile has no MLflow, which a schedule of the retrain pipeline needs")
        assert done.code == 0, (words, done.out, done.err)
    cluster.schedules.remove(schedule["name"])


@pytest.mark.filterwarnings("ignore:This client only works")
def test_its_program_starts_a_run(
    cluster: RealCluster, digits_in_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicpmv_finetune.kubeflow.client import connect
    from minicpmv_finetune.kubeflow.profile import chosen_profile, with_profile
    from minicpmv_finetune.pipelines import finetune

    program = tutorial.block(KUBEFLOW, "python")
    connected = connect(chosen_profile())
    started: list[Any] = []

    class Client:
        """The page's client, with the address, account and experiment that the suite's environment needs."""

        def create_run_from_pipeline_func(self, pipeline: object, arguments: dict[str, object]) -> None:
            assert pipeline is finetune
            started.append(
                connected.client.create_run_from_pipeline_func(
                    with_profile(finetune, chosen_profile().with_gpus(0)),
                    arguments={**arguments, **digits_in_store, **SMALL, "seed": 4},
                    experiment_name=cluster.experiment,
                    service_account=chosen_profile().service_account,
                )
            )

    monkeypatch.setattr(kfp, "Client", Client)
    exec(compile(program, "docs/tutorial.md", "exec"), {})
    (result,) = started
    cluster.runs.append(result.run_id)
    eventually(lambda: cluster.steps(result.run_id).get("validate-data", {}).get("state") == "SUCCEEDED", 900)
    assert cluster.command("cancel", result.run_id).code == 0
