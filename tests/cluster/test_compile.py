"""`minicpmv-finetune compile`: the files that it writes, and the options that it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict

from minicpmv_finetune.kubeflow.compiling import pipeline_for
from minicpmv_finetune.kubeflow.profile import load_profile
from minicpmv_finetune.pipelines.finetuning import FINETUNE
from minicpmv_finetune.pipelines.pipeline import Pipeline
from minicpmv_finetune.pipelines.retraining import RETRAIN
from tests.cluster.commands import ROOT, Command

PROFILE = ROOT / "k8s" / "profiles" / "dev.yaml"


def _first_document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = next(iter(yaml.safe_load_all(path.read_text())))
    return document


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "minicpmv-finetune"),
        (["--retrain"], "minicpmv-retrain"),
        (["--pipeline", "retrain"], "minicpmv-retrain"),
    ],
    ids=["finetune", "old-option", "retrain"],
)
@pytest.mark.parametrize("settings", [[], ["--profile", PROFILE]], ids=["plain", "profile"])
def test_each_pipeline_is_written_with_or_without_a_profile(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    name: str,
    settings: list[str | Path],
) -> None:
    monkeypatch.delenv("MINICPMV_FINETUNE_PROFILE")
    path = tmp_path / "pipeline.yaml"
    done = command("compile", path, *options, *settings)
    assert done.code == 0, done.err
    assert str(path) in done.out
    assert _first_document(path)["pipelineInfo"]["name"] == name
    secret = "minicpmv-s3" if settings else "mlpipeline-minio-artifact"
    assert f"secretName: {secret}" in path.read_text()
    assert ("No profile is named, so kubeflow is used" in done.err) == (not settings)
    assert ("needs the champion in MLflow's registry" in done.err) == (name == "minicpmv-retrain" and not settings)


def test_options_replace_settings_of_a_profile(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    words = ["--profile", "kubeflow-profile", "--namespace", "team-a", "--registry", "registry.example.com/team/"]
    assert command("compile", path, *words, "--objects").code == 0
    assert {document["metadata"]["namespace"] for document in yaml.safe_load_all(path.read_text())} == {"team-a"}
    text = path.read_text()
    assert "image: registry.example.com/team/trainer:" in text
    assert "image: registry.example.com/team/data:" in text
    assert text.count("resourceType: nvidia.com/gpu") == 2
    assert command("compile", path, *words, "--gpus", "0").code == 0
    assert "nvidia" not in path.read_text()


def test_the_last_step_links_to_the_ui_that_the_environment_names(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://me:hidden@kubeflow.example.com")
    path = tmp_path / "pipeline.yaml"
    assert command("compile", path, "--profile", "kubeflow").code == 0
    executors = _first_document(path)["deploymentSpec"]["executors"]
    variables = {
        (name, item["name"], item["value"])
        for name, executor in executors.items()
        for item in executor["container"]["env"]
        if "UI_ENDPOINT" in item["name"]
    }
    assert variables == {("exec-notify", "KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example.com")}


@pytest.mark.parametrize("name", ["finetune", "retrain"])
def test_objects_belong_to_the_profiles_namespace(name: str, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "objects.yaml"
    assert command("compile", path, "--objects", "--pipeline", name, "--profile", PROFILE).code == 0
    kinds = {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}
    assert set(kinds) == {"Pipeline", "PipelineVersion"}
    assert kinds["Pipeline"]["metadata"]["name"] == f"minicpmv-{name}"
    assert {document["metadata"]["namespace"] for document in kinds.values()} == {_first_document(PROFILE)["namespace"]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--profile", "kubeflow-profile"], "give --namespace NAME or set MINICPMV_FINETUNE_NAMESPACE"),
        (["--profile", "no-such-profile"], "use one of kubeflow, kubeflow-profile, or a file"),
        (["--partitions", "2", "--profile", PROFILE], "set preprocess_partitions there"),
    ],
)
def test_contradicting_options_are_refused(
    command: Command, tmp_path: Path, options: list[str | Path], sentence: str
) -> None:
    done = command("compile", tmp_path / "pipeline.yaml", *options)
    assert done.code == 2
    assert sentence in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pipeline", [FINETUNE, RETRAIN], ids=lambda pipeline: pipeline.name)
def test_the_form_has_a_drop_down_where_the_values_are_known(pipeline: Pipeline) -> None:
    compiled = pipeline_for(pipeline, load_profile(PROFILE))
    parameters = MessageToDict(compiled.pipeline_spec)["root"]["inputDefinitions"]["parameters"]
    choices = {name: found["literals"] for name, found in parameters.items() if "literals" in found}
    expected = {item.name: [True, False] if item.type is bool else list(item.choices) for item in pipeline.inputs}
    assert choices == {name: values for name, values in expected.items() if values}
    assert set(choices) >= {"metric"}


@pytest.mark.parametrize("pipeline", [FINETUNE, RETRAIN], ids=lambda pipeline: pipeline.name)
def test_the_description_has_a_line_for_every_input_in_groups(pipeline: Pipeline) -> None:
    info = pipeline.build().pipeline_spec.pipeline_info
    lines = [line for line in info.description.splitlines() if line.startswith("- ")]
    assert sorted(line.split("`")[1] for line in lines) == sorted(item.name for item in pipeline.inputs)
    assert info.description.index("**Data**") < info.description.index("**Registry**")


def test_the_graph_has_few_boxes_with_names_of_their_own() -> None:
    spec = MessageToDict(FINETUNE.build().pipeline_spec)
    outputs = [step.get("outputDefinitions", {}) for step in spec["components"].values()]
    names = [name for found in outputs for name in found.get("artifacts", {})]
    assert len(names) == len(set(names)) == 21
    assert not {"metrics", "report", "summary", "rejects"} & set(names)
    assert [name for found in outputs for name in found.get("parameters", {})] == ["decision"]
    assert "register-if-better" in str(spec)
    assert "'retrain'" in str(MessageToDict(RETRAIN.build().pipeline_spec)["root"])
