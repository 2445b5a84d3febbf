"""`serve` and `chat` say what is missing before they load a model."""

import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minicpmv_finetune.cli import serving
from minicpmv_finetune.cli.main import app
from minicpmv_finetune.errors import UserError


def run(*words: str) -> None:
    CliRunner().invoke(app, list(words), catch_exceptions=False)


@pytest.mark.parametrize(("command", "library"), [("serve", "openai"), ("chat", "gradio")], ids=["serve", "chat"])
def test_a_missing_library_is_named_with_its_remedy(
    command: str, library: str, tiny_46: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    monkeypatch.setattr(serving, "require_free_port", lambda host, port: None)
    with pytest.raises(
        UserError, match=rf"{library} is not installed; run pip install .minicpmv-finetune\[{command}\]"
    ):
        run(command, "--model", str(tiny_46))


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_port_in_use_is_named(command: str, tiny_46: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"--port: {port} is used"):
            run(command, "--model", str(tiny_46), "--port", port)


@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "--model: .*absent: not found"),
        ("empty", "--model: .*empty: there is no config.json, .* give its folder"),
        ("adapter", "--model: .*it is an adapter: give the merged model"),
        ("run", "--model: .*run: .* give .*run/model"),
        ("llama", "--model: .*model_type 'llama'"),
    ],
    ids=str.split,
)
def test_a_folder_that_is_no_model_is_named(command: str, kind: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    files = {
        "empty": [],
        "adapter": ["adapter_config.json"],
        "run": ["model/config.json"],
        "llama": ["config.json"],
    }
    for name in files.get(kind, []):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"model_type": "llama"}')
    if kind == "empty":
        folder.mkdir()
    with pytest.raises(UserError, match=words):
        run(command, "--model", str(folder))


def test_an_address_that_others_reach_is_refused_before_anything_is_loaded(
    tiny_46: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--host: 0\.0\.0\.0: .* give 127\.0\.0\.1"):
        run("serve", "--model", str(tiny_46), "--host", "0.0.0.0")


def test_a_base_model_that_is_not_there_is_named(tiny_46: Path) -> None:
    with pytest.raises(UserError, match="--base-model"):
        run("chat", "--model", str(tiny_46), "--base-model", "no/such/folder")
