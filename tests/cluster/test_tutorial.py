"""The second half of the tutorial, typed as it is on the page, against servers that keep state."""

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from minicpmv_finetune.kubeflow import parameters
from tests.cluster.commands import BASE_MODEL, Command
from tests.cluster.fake_kubeflow import FakeKubeflow
from tests.cluster.fake_kubernetes import FakeKubernetes
from tests.docs import tutorial

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

KUBEFLOW = tutorial.section("On Kubeflow")
SPACE = "/api/v1/namespaces/kubeflow"


@pytest.fixture
def desk(
    stock: FakeKubernetes,
    kubeflow: FakeKubeflow,
    s3_server: dict[str, str],
    s3_client: "S3Client",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder of a reader who has got the data, with a cluster whose addresses and hub are reached from here."""
    for name, value in {
        **s3_server,
        "KF_PIPELINES_ENDPOINT": kubeflow.url,
        "MLFLOW_TRACKING_URI": kubeflow.url,
    }.items():
        monkeypatch.setenv(name, value)
    if "mlpipeline" not in {bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]}:
        s3_client.create_bucket(Bucket="mlpipeline")
    stock.objects["/api/v1/nodes"] = {"items": [{"status": {"allocatable": {"nvidia.com/gpu": "1"}}}]}
    kubeflow.kubernetes["/version"] = "3.17.2"
    monkeypatch.setattr(parameters, "pin_to_commit", lambda *arguments: BASE_MODEL)
    data = tmp_path / "build" / "public" / "easy-vqa-300" / "data"
    data.mkdir(parents=True)
    Image.new("RGB", (64, 64), "blue").save(data / "one.png")
    turns = [{"role": "user", "content": "what color is the shape?"}, {"role": "assistant", "content": "blue"}]
    for name in ("train.jsonl", "test-scores.jsonl"):
        (data / name).write_text(json.dumps({"id": name, "image": "one.png", "conversations": turns}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:This client only works")
def test_its_second_half_can_be_typed(
    desk: Path, kubeflow: FakeKubeflow, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.logs["train"] = "loss 0.5\n"
    variables: dict[str, str] = {}
    printed: dict[str, str] = {}
    for line in tutorial.typed(KUBEFLOW):
        program, *words = line.with_values(variables)
        if program == "export":
            for name, _, value in (word.partition("=") for word in words):
                monkeypatch.setenv(name, value)
            continue
        assert program == "minicpmv-finetune"
        if words[:2] == ["schedule", "apply"]:
            _write_with_address(desk / words[3], tutorial.block(KUBEFLOW, "yaml"), variables["data"])
        done = command(*words, *(["--poll", "0"] if "--wait" in words else []))
        assert done.code == 0, (words, done.out, done.err)
        printed[" ".join(words[:2])] = done.out
        if line.variable:
            variables[line.variable] = done.out.strip()
    assert "FAILED" not in printed["preflight --data"]
    assert "data_uri" in printed["compile build/pipeline.yaml"]
    (run,) = kubeflow.runs.values()
    given = run["runtime_config"]["parameters"]
    assert (given["data_uri"], given["eval_data_uri"]) == (variables["data"], variables["held_out"])
    assert "train          SUCCEEDED" in printed["runs shapes-1"]
    assert printed["logs shapes-1"] == "loss 0.5\n"
    assert "shapes-nightly" in printed["schedule list"]
    assert not kubeflow.recurring_runs

    program = tutorial.block(KUBEFLOW, "python")
    _write_with_address(desk / "submit.py", program, variables["data"])
    runpy.run_path(str(desk / "submit.py"))
    assert len(kubeflow.runs) == 2


def _write_with_address(path: Path, text: str, address: str) -> None:
    """Write a file of the page, with the address that `upload` has printed in the place of the page's."""
    shown = "s3://mlpipeline/…/train.jsonl"
    assert shown in text
    path.write_text(text.replace(shown, address))
