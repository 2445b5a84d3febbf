"""Which program serves, and transformers' serving application with one model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune import answer, load
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.serving import server
from minicpmv_finetune.serving.server import choose_server, vllm_command
from tests.serving.test_processor import image_uri


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("without_vllm")
def test_transformers_serves_this_machine_where_there_is_no_vllm(tiny_46: Path) -> None:
    assert choose_server("auto", tiny_46, "127.0.0.1") == "transformers"
    with pytest.raises(UserError, match="there is no command vllm"):
        choose_server("vllm", tiny_46, "127.0.0.1")
    with pytest.raises(UserError, match=r"0\.0\.0\.0: .*asks nobody for a key"):
        choose_server("auto", tiny_46, "0.0.0.0")


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(("version", "chosen"), [("2.6", "transformers"), ("4.5", "transformers"), ("4.6", "vllm")])
def test_vllm_serves_what_needs_no_code_of_the_checkpoint(
    tiny: Callable[[str], Path], version: str, chosen: str
) -> None:
    assert choose_server("auto", tiny(version), "127.0.0.1") == chosen
    assert choose_server("transformers", tiny(version), "127.0.0.1") == "transformers"
    if chosen != "vllm":
        with pytest.raises(UserError, match="which this command never does"):
            choose_server("vllm", tiny(version), "127.0.0.1")


@pytest.mark.usefixtures("with_vllm")
def test_other_machines_need_a_key(tiny_46: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match="VLLM_API_KEY is not set"):
        choose_server("vllm", tiny_46, "0.0.0.0")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert choose_server("vllm", tiny_46, "0.0.0.0") == "vllm"


def test_the_key_is_not_on_vllms_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    command = vllm_command(Path("/models/a"), "0.0.0.0", 8000)
    assert command[:3] == ["vllm", "serve", "/models/a"]
    assert "secret" not in " ".join(command)
    assert "--trust-remote-code" not in command


@pytest.fixture(scope="module", params=["2.6", "4.6"])
def served(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Any:
    """A client of the application, and the model that it serves."""
    pytest.importorskip("openai", reason="needs the extra serve")
    testclient = pytest.importorskip("starlette.testclient")
    model = load(tiny(request.param))
    return testclient.TestClient(server.build_app(model), base_url="http://127.0.0.1:8000"), model


def request_about(image: str, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "Which digit is this?"},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def test_a_request_is_answered_as_the_evaluation_answers(served: Any) -> None:
    client, model = served
    image = image_uri((40, 30))
    expected = answer(model, "Which digit is this?", image, max_new_tokens=8)
    for fields in ({}, {"model": "minicpmv"}, {"temperature": 0}):
        response = client.post("/v1/chat/completions", json=request_about(image, **fields))
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == expected


def test_a_stream_is_the_same_answer(served: Any) -> None:
    client, model = served
    image = image_uri((40, 30))
    response = client.post("/v1/chat/completions", json=request_about(image, stream=True))
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    # A stream holds back the bytes of a character that is not complete.
    expected = answer(model, "Which digit is this?", image, max_new_tokens=8).rstrip("\ufffd")
    assert "".join(pieces).strip() == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": ["a"]}, "stop: not supported"),
        ({"tools": [{"type": "function"}]}, "tools: not supported"),
        ({"chat_template_kwargs": {"other": 1}}, "other: not supported"),
    ],
)
def test_a_mistake_is_a_sentence(served: Any, fields: dict[str, Any], words: str) -> None:
    response = served[0].post("/v1/chat/completions", json=request_about(image_uri((9, 7)), **fields))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_images_of_the_servers_machine_are_not_read(served: Any, tmp_path: Path) -> None:
    for address in ("/etc/hostname", f"file://{tmp_path}/a.png", "http://127.0.0.1/a.png"):
        response = served[0].post("/v1/chat/completions", json=request_about(address))
        assert response.status_code == 400
        assert "send the image itself" in response.json()["error"]["message"]


def test_no_other_model_can_be_loaded(served: Any) -> None:
    client, _ = served
    other = {"model": "openbmb/MiniCPM-V-4.6"}
    assert client.post("/v1/chat/completions", json={**request_about(image_uri((9, 7))), **other}).status_code == 400
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/completions", "/v1/audio/transcriptions"):
        assert client.post(path, json=other).status_code == 404, path
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["minicpmv"]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_page_under_another_name_gets_no_answer(served: Any) -> None:
    response = served[0].get("/v1/models", headers={"Host": "example.org"})
    assert response.status_code == 400
