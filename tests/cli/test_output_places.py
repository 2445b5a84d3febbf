"""Every command that writes, on every kind of place: no byte that the command did not write changes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minicpmv_finetune.cli.kubeflow import _refuse_other_file
from minicpmv_finetune.cli.main import app
from minicpmv_finetune.data.samples import DatasetInfo
from minicpmv_finetune.errors import UserError
from tests.shards.example_shards import write_example_shards

COMMANDS = {
    "import-data": "import-data {mine}/train.json --out {out}",
    "validate-data": "validate-data --data {mine}/train.json --out {out}",
    "preprocess": "preprocess --dataset {mine}/dataset --base-model {mine}/base --out {out}",
    "train": "train --model_name_or_path {mine}/base --data_path {mine}/shards --output_dir {out}",
    "train-raw": "train --model_name_or_path {mine}/base --data_path {mine}/train.json --output_dir {out}",
    "merge": "merge --base-model {mine}/base --adapter {mine}/adapter --shards {mine}/shards --out {out}",
    "evaluate": "evaluate --model {mine}/model --dataset {mine}/dataset --base-model {mine}/base --out {out}",
    "run": "run --data {mine}/train.json --base-model {mine}/base --out {out}",
    "retrain": "retrain --data {mine}/train.json --base-model {mine}/base --out {out}",
    "demo": "demo --out {out}",
    "tiny-base": "tiny-base --corpus {mine}/train.json --out {out}",
    "compile": "compile {out}",
}
FOLDERS = ("dataset", "base", "shards", "adapter", "model")


@pytest.fixture
def mine(tmp_path: Path, tiny_46: Path) -> Path:
    """A user's project: data, images, folders that steps read, and files that concern no step."""
    folder = tmp_path / "mine"
    for name in (*FOLDERS, "images", "project/deeper"):
        (folder / name).mkdir(parents=True)
    for name in ("train.json", "images/a.png", "notes.txt", "project/deeper/notes.txt", *(f"{n}/x" for n in FOLDERS)):
        (folder / name).write_text("mine")
    sample = {
        "image": "images/a.png",
        "conversations": [{"role": role, "content": "x"} for role in ("user", "assistant")],
    }
    (folder / "train.json").write_text(json.dumps([sample]))
    info = DatasetInfo(fingerprint="0", rows={"train": 1, "eval": 0}, rejected={})
    (folder / "dataset" / "dataset.json").write_text(info.model_dump_json())
    write_example_shards(folder / "shards")
    for name in ("base", "model"):
        shutil.copyfile(tiny_46 / "config.json", folder / name / "config.json")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link-to-file").symlink_to(folder / "notes.txt")
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


Invoke = Callable[[str, str], str]


@pytest.fixture
def invoke(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command that must be refused in one sentence, and return the sentence."""
    monkeypatch.chdir(mine)

    def run(command: str, out: str) -> str:
        before = tree(mine.parent)
        words = COMMANDS[command].format(mine=mine, out=out).split()
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, UserError), (done.output, done.exception)
        assert tree(mine.parent) == before
        assert "\n" not in str(done.exception)
        return str(done.exception)

    return run


@pytest.mark.parametrize(
    "out",
    [
        pytest.param("{mine}", id="parent-of-the-inputs"),
        pytest.param("{mine}/", id="trailing-slash"),
        pytest.param(".", id="working-directory"),
        pytest.param("./", id="working-directory-with-slash"),
        pytest.param("..", id="two-dots"),
        pytest.param("{mine}/..", id="parent-of-the-parent"),
        pytest.param("project", id="foreign-files"),
        pytest.param("project/..", id="a-way-back"),
        pytest.param("notes.txt", id="a-file"),
        pytest.param("{mine}/train.json", id="the-data"),
        pytest.param("{mine}/images", id="the-images"),
        pytest.param("{mine}/../link", id="link-to-the-parent"),
        pytest.param("{mine}/../link-to-file", id="link-to-a-file"),
        pytest.param("/proc/x", id="unwritable"),
        pytest.param("notes.txt/x", id="below-a-file"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_is_not_the_commands_own_is_refused(command: str, out: str, mine: Path, invoke: Invoke) -> None:
    assert invoke(command, out.format(mine=mine))


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command, line in COMMANDS.items() for name in FOLDERS if f"{{mine}}/{name} " in line],
)
@pytest.mark.parametrize("below", ["", "/", "/new", "/../{name}"])
def test_an_input_and_a_folder_in_it_are_refused(command: str, name: str, below: str, invoke: Invoke) -> None:
    sentence = invoke(command, f"{name}{below.format(name=name)}")
    assert "input" in sentence, sentence


@pytest.mark.parametrize(
    ("command", "option"), [("preprocess", "--cache"), ("train", "--cache_dir"), ("train-raw", "--cache_dir")]
)
def test_a_cache_in_an_input_is_refused(command: str, option: str, invoke: Invoke) -> None:
    assert "lies in the input" in invoke(command, f"new {option} base/cache")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "merge"])
def test_a_store_is_refused_where_a_command_writes_to_this_machine(command: str, invoke: Invoke) -> None:
    sentence = invoke(command, "s3://bucket/place")
    assert "s3://bucket/place: " in sentence
    assert "local path" in sentence


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("import-data", "compile")])
def test_a_mount_point_with_foreign_files_is_refused(
    command: str, mine: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mine / "project")
    assert "did not write" in invoke(command, "project")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("validate-data", "rejects.jsonl"),
        ("validate-data", "data-report.html"),
        ("preprocess", "preprocess-rejects.jsonl"),
        ("preprocess", "preprocess-report.html"),
        ("import-data", "new.rejects.jsonl"),
        ("import-data", "new.pictures.tar"),
    ],
)
def test_a_users_file_beside_the_output_is_refused(command: str, name: str, mine: Path, invoke: Invoke) -> None:
    (mine / name).write_text("mine")
    assert name in invoke(command, "new.jsonl" if command == "import-data" else "new")


def test_a_list_of_rejects_as_data_is_not_overwritten(mine: Path) -> None:
    (mine / "rejects.jsonl").write_text("{}")
    words = ["validate-data", "--data", str(mine / "rejects.jsonl"), "--out", str(mine / "ds")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError)
    assert (mine / "rejects.jsonl").read_text() == "{}"


def test_objects_in_a_store_are_neither_replaced_nor_deleted(s3_uri: str, mine: Path) -> None:
    from minicpmv_finetune import storage

    storage.write_bytes(f"{s3_uri}/models/base/config.json", b"{}")
    for out in (f"{s3_uri}/models", f"{s3_uri}/models/base", f"{s3_uri}/models/base/"):
        words = COMMANDS["merge"].format(mine=mine, out=out).split()
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, UserError)
        assert "were not uploaded by this program" in str(done.exception)
    words = f"merge --base-model {s3_uri}/models/base --adapter a --shards s --out {s3_uri}/models/base/new".split()
    done = CliRunner().invoke(app, words)
    assert "lies in the input --base-model" in str(done.exception)
    assert storage.read_bytes(f"{s3_uri}/models/base/config.json") == b"{}"


@pytest.mark.parametrize(
    "content",
    [
        "# PIPELINE DEFINITION\n# Name: another-pipeline\n",
        "apiVersion: pipelines.kubeflow.org/v2beta1\nkind: Pipeline\nmetadata:\n  name: another-pipeline\n",
        "# my notes about pipelines.kubeflow.org\n",
    ],
)
def test_another_pipeline_is_not_overwritten(content: str, mine: Path, invoke: Invoke) -> None:
    (mine / "pipeline.yaml").write_text(content)
    assert "exists and is no pipeline that compile wrote" in invoke("compile", "pipeline.yaml")


def test_a_compiled_pipeline_is_written_again(tmp_path: Path) -> None:
    compiled = Path(__file__).parents[2] / "minicpmv_finetune" / "pipelines" / "compiled"
    for file in sorted(compiled.glob("*.yaml")):
        _refuse_other_file(file)
