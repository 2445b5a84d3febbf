"""Every program below examples/ runs, from the repository's root, as its documentation says."""

import csv
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import read_samples
from tests.cluster.fake_kubeflow import FakeKubeflow, serving

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BASE_MODEL = "/models/MiniCPM-V-4.6"


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: object
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as `python examples/NAME` does, in this process, because importing torch again takes seconds."""

    def start(name: str, *words: str | Path) -> Ended:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"examples/{name}", *map(str, words)])
        capsys.readouterr()  # what fixtures have printed
        code: object = 0
        try:
            runpy.run_path(f"examples/{name}", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        output = capsys.readouterr()
        return Ended(code, output.out, output.err)

    return start


def test_data_from_a_table_is_accepted_whole(run: Run, digits: Path, tmp_path: Path) -> None:
    images = sorted((digits / "images").glob("*.png"))[:4]
    table = tmp_path / "table" / "digits.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["image", "question", "answer", "tag"])
        rows.writerows([[str(image), "Which digit?", str(number), "odd"] for number, image in enumerate(images)])
    done = run("make_data.py", table, tmp_path / "train.json")
    assert (done.code, done.out) == (0, f"4 samples in {tmp_path / 'train.json'}\n"), done.err
    settings = ValidationSettings(max_reject_ratio=0, eval_fraction=0)
    validate_data(str(tmp_path / "train.json"), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    samples = list(read_samples(tmp_path / "dataset", "train"))
    assert [sample.id for sample in samples] == [f"digits-{number}" for number in range(1, 5)]
    assert [sample.turns[-1].text for sample in samples] == ["0", "1", "2", "3"]
    assert {sample.tags for sample in samples} == {("odd",)}
    assert not any(json.loads((tmp_path / "train.json").read_text())[0]["image"].startswith(place) for place in "/~")


@pytest.mark.parametrize("data", ["train.json", "shards"])
def test_training_flags_are_accepted_without_a_remark(data: str) -> None:
    remarks: list[str] = []
    arguments = parse(
        [str(EXAMPLES / "training.yaml"), "--data_path", data, "--output_dir", "y"], announce=remarks.append
    )
    assert remarks == []
    assert arguments.training.use_lora
    assert not arguments.training.tune_vision
    assert (arguments.lora.lora_r, arguments.lora.lora_alpha) == (16, 32)
    assert arguments.training.train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize("version", [pytest.param("2.6", marks=pytest.mark.docs_only), "4.6"])
def test_a_model_is_asked_about_each_image(run: Run, tiny: Callable[[str], Path], digits: Path, version: str) -> None:
    images = sorted((digits / "images").glob("*.png"))[:2]
    done = run("ask_a_model.py", tiny(version), "Which digit is this?", *images)
    assert done.code == 0, done.err
    expected = [predict(str(tiny(version)), [str(image)], "Which digit is this?", "", 64) for image in images]
    lines = "".join(f"{image}: {text}\n" for image, text in zip(images, expected, strict=True))
    assert (done.out, done.err) == (lines, "")


def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, digits: Path) -> None:
    done = run("ask_a_model.py", tmp_path, "Which?", next((digits / "images").glob("*.png")))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("ends", "code"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_run_is_submitted_with_the_profile(
    run: Run, ends: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(FakeKubeflow()) as kubeflow:
        kubeflow.outcomes["train"] = ends
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url)
        done = run(
            "submit_with_sdk.py",
            ROOT / "k8s" / "profiles" / "dev.yaml",
            "s3://receipts/train.json",
            "--base-model",
            BASE_MODEL,
            "--poll",
            "0",
        )
        (submitted,) = kubeflow.runs.values()
    assert done.code == code, done.err
    assert done.out.splitlines()[-1] == f"run {submitted['run_id']}: {ends}"
    assert submitted["runtime_config"]["parameters"] == {
        "data_uri": "s3://receipts/train.json",
        "base_model_uri": BASE_MODEL,
    }
    assert submitted["service_account"] == "minicpmv-finetune"
    assert "nvidia.com/gpu" in json.dumps(submitted["pipeline_spec"])


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text()
    listed = {path.name for path in EXAMPLES.iterdir() if f"({path.name})" in text}
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".yaml", ".ipynb"}}
