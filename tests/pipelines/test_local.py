"""The whole pipeline with kfp.local: on digits, and with mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from minicpmv_finetune import environment, storage
from minicpmv_finetune.cli.main import main
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.pipelines.demo import DEMO_INPUTS, exact_match_without_lora
from minicpmv_finetune.pipelines.local import LocalRun, run_pipeline
from minicpmv_finetune.pipelines.summary import print_summary
from tests.warm_processes import warm_processes, warm_steps

QUICK = {**DEMO_INPUTS, "num_train_epochs": 1.0}
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
)


@pytest.fixture(scope="module")
def finished(tiny_46: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalRun, Path]:
    out = tmp_path_factory.mktemp("run")
    few = digits / "hundred.json"
    few.write_text(json.dumps(json.loads((digits / "eval.json").read_text())[:100]))
    inputs = {"data_uri": str(digits / "train.json"), "eval_data_uri": str(few)}
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, f"canary-{name}")
        return run_pipeline(out, {**inputs, "base_model_uri": str(tiny_46), **QUICK}), out


def test_all_steps_ran_and_wrote_their_outputs(finished: tuple[LocalRun, Path]) -> None:
    run, out = finished
    assert list(run.seconds)[:5] == ["validate-data", "preprocess", "train", "merge", "evaluate"]
    assert (out / "model" / "config.json").is_file()
    for name in ("report", "data-report", "preprocess-report", "training-report", "merge-report"):
        assert "<html" in (out / f"{name}.html").read_text()
    assert (out / "rejects.jsonl").read_text() == ""
    scores = run.scores()
    assert scores["samples"] == 100
    assert scores["base_exact_match"] <= 0.15


def test_mlflow_contains_one_run_with_one_nested_run_per_step(finished: tuple[LocalRun, Path]) -> None:
    _, out = finished
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = [run.info.run_name for run in runs]
    steps = {"validate-data", "preprocess", "train", "merge", "evaluate"}
    assert steps < set(names)
    assert len(names) == len(set(names))
    assert {run.info.status for run in runs} == {"FINISHED"}
    (train,) = (run for run in runs if run.info.run_name == "train")
    assert train.data.params["lora_r"] == "16"
    assert len(client.get_metric_history(train.info.run_id, "train/loss")) >= 4
    assert float(train.data.params["adam_beta2"]) == 0.999, "also what transformers decided"
    assert train.data.params["effective/batch_size"] == "32"
    reports = {"validate-data": "data.html", "preprocess": "shards.html", "train": "training.html"}
    for run in runs:
        if run.info.run_name in steps:
            assert run.data.params["git_commit"] == git_commit()
            assert run.data.params["data_fingerprint"] == train.data.params["data_fingerprint"]
        if report := reports.get(run.info.run_name):
            assert report in [item.path for item in client.list_artifacts(run.info.run_id)]
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert {"lora_r", "batch_size", "num_train_epochs", "learning_rate", "git_commit", "metric"} <= set(
        parent.data.params
    )
    assert {"loss", "score", "score_low", "score_high", "improvement"} <= set(parent.data.metrics)


def test_a_run_whose_steps_are_all_finished_needs_neither_torch_nor_mlflow(
    finished: tuple[LocalRun, Path], tiny_46: Path, digits: Path
) -> None:
    run, out = finished
    record = run.folder / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "is_finished": False}))
    code = (
        "import json, sys; from pathlib import Path; from minicpmv_finetune.pipelines import local, step_servers\n"
        "step_servers.TORCH_IMPORTS = ('no_step_needs_it',)\n"
        "servers, of = [], step_servers.StepServers.of\n"
        "step_servers.StepServers.of = lambda *a: servers.append(a[0]) or of(*a)\n"
        "run = local.run_pipeline(Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "print({'torch', 'mlflow'} & set(sys.modules), {server._with_torch for server in servers}, run.folder)"
    )
    inputs = {"data_uri": str(digits / "train.json"), "eval_data_uri": str(digits / "hundred.json")}
    inputs |= {"base_model_uri": str(tiny_46), **QUICK}
    command = [sys.executable, "-c", code, str(out), json.dumps(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"set() {{None}} {run.folder}"
    reused = re.findall(r"✓ (\S+) .* reused", done.stdout)
    assert reused[:4] == ["preprocess", "train", "merge", "evaluate"]
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {found.info.status for found in runs} == {"FINISHED"}


def test_the_merged_model_answers_a_question(finished: tuple[LocalRun, Path], digits: Path) -> None:
    _, out = finished
    image = json.loads((digits / "eval.json").read_text())[0]["image"]
    command = [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()", "predict"]
    options = ["--model", str(out / "model"), "--image", str(digits / image), "--prompt", "Which digit is written?"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert done.stderr == ""


def test_the_summary_contains_scores_and_paths(
    finished: tuple[LocalRun, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished
    monkeypatch.chdir(out)
    print_summary(run, out, {"without": 0.125}, out / "pipeline.yaml", {"image": "a b.png", "prompt": "Which digit?"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = run.scores()
    assert ["100", "held-out", "samples,", "free", "generation"] in lines
    for model in ("base", "tuned"):
        (row,) = (line for line in lines if line[:1] == [model])
        assert row[1] == f"{scores[f'{model}_exact_match']:.3f}"
    assert ["without", "0.125"] in lines
    paths = {" ".join(line[:-1]): line[-1] for line in lines if line}
    assert paths["report"] == "report.html"
    assert paths["merged model"] == "model"
    assert paths["pipeline"] == "pipeline.yaml"
    (example,) = (line for line in lines if line[:3] == ["ask", "the", "model"])
    assert " ".join(example).endswith("predict --model model --image 'a b.png' --prompt 'Which digit?'")


def test_the_contribution_of_the_low_rank_updates_is_measured(finished: tuple[LocalRun, Path], tiny_46: Path) -> None:
    run, _ = finished
    without_lora = exact_match_without_lora(
        tiny_46, run.output("train", "adapter"), run.output("validate-data", "dataset")
    )
    assert without_lora < run.scores()["tuned_exact_match"]


def test_no_secret_is_written_to_a_file(finished: tuple[LocalRun, Path]) -> None:
    _, out = finished
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {"run.log", "mlflow.db", "executor_output.json", "training.json"} <= {path.name for path in written}
    assert [path for path in written if b"canary-" in path.read_bytes()] == []


def test_the_merge_command_writes_to_a_store(
    finished: tuple[LocalRun, Path], tiny_46: Path, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    model = run.output("merge", "model")
    inputs = {
        "base-model": tiny_46,
        "adapter": run.output("train", "adapter"),
        "shards": run.output("preprocess", "shards"),
    }
    flags = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", "merge", *flags, "--out", f"{s3_uri}/models/digits"])
    with warm_processes(), pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    uploaded = storage.fetch(f"{s3_uri}/models/digits", tmp_path / "cache")
    assert {path.name for path in uploaded.iterdir()} == {path.name for path in model.iterdir()} - {MARK}
    assert (uploaded / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads(storage.read_bytes(f"{s3_uri}/models/digits.merge-report.json"))["changed"]


def test_a_steps_error_message_is_passed_on(tiny_46: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    with warm_steps(), pytest.raises(UserError, match=r"no usable sample|the array is empty"):
        run_pipeline(tmp_path / "out", {"data_uri": str(tmp_path / "data.json"), "base_model_uri": str(tiny_46)})


@pytest.mark.parametrize("address", ["localhost:5000", "sqlite:////proc/x/mlflow.db"])
def test_an_address_of_mlflow_that_cannot_be_used_is_found_before_the_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.TRACKING_URI.name, address)
    with pytest.raises(UserError, match="give the address of an MLflow server, such as http://localhost:5000"):
        run_pipeline(tmp_path / "out", {"registered_model": "model"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--data", "nowhere.json"], "nowhere.json"),
        (["run", "--data", "x.json", "--training-flags", "{"], "--training-flags: invalid JSON"),
        (["train", "--data_path", "x", "--no_such", "1"], "--no_such: no such flag"),
        (["predict", "--model", "nowhere", "--prompt", "?"], "nowhere"),
        (["merge", "--base-model", "x", "--adapter", "a", "--shards", "b", "--out", "c"], "--base-model: x: not found"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2_and_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    command = [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_step_without_its_store_ends_the_run_with_exit_code_75(
    tiny_46: Path,
    unreachable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    arguments = ["--data", "s3://bucket/train.json", "--base-model", str(tiny_46), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", "run", *arguments])
    with warm_steps(), pytest.raises(SystemExit) as ended:
        main()
    errors = capfd.readouterr().err
    assert ended.value.code == 75, errors
    assert "s3://bucket/train.json" in errors
    assert "Traceback" not in errors


def test_the_page_of_outputs_lists_what_a_run_leaves(finished: tuple[LocalRun, Path]) -> None:
    run, out = finished
    page = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text()
    listed = {
        heading: set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
        for heading, text in re.findall(r"^##+ (.+?)\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    }

    def visible(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if not path.name.startswith(".")}

    assert visible(out) == listed["At the top"]
    steps = [path for path in run.folder.iterdir() if path.is_dir()]
    assert {"validate-data", "preprocess", "train", "merge", "evaluate"} <= {step.name for step in steps} <= set(listed)
    for step in steps:
        # A report is there a second time with an ending, and checkpoints only while they are needed.
        others = {"executor_output.json", "checkpoints", *(f"{name}.html" for name in listed[step.name])}
        assert visible(step) - others == listed[step.name] - {"checkpoints"}, step.name
    fields = json.loads((run.folder / "evaluate" / "predictions").read_text().splitlines()[0])
    (named,) = re.findall(r"^A line of `predictions`: (.*?), and more", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", named)) - {"fixed", "broken", "both_right", "both_wrong"} <= set(fields)
