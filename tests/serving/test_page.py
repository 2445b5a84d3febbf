"""The page of `chat`, in a browser."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minicpmv_finetune import answer, load
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.serving.asking import LoadedModel
from tests.serving.test_asking import write_image

pytest.importorskip("gradio", reason="needs the extra chat")


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path]) -> dict[str, LoadedModel]:
    return {"tuned": load(tiny("4.6")), "base": load(tiny("2.6"))}


@pytest.fixture(scope="module")
def address(models: dict[str, LoadedModel]) -> Iterator[str]:
    """Where the page is."""
    from minicpmv_finetune.serving.page import build_page, run_page

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build_page(models, max_new_tokens=8)
    run_page(page, port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium; `make browser` installs it")
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield instance
        instance.close()


def answers(page: Any, count: int) -> list[str]:
    """The answers on the page when there are as many, from left to right."""
    found = page.get_by_test_id("bot")
    found.nth(count - 1).wait_for()
    page.wait_for_function("![...document.querySelectorAll('[data-testid=bot]')].some(e => e.innerText.trim() === '…')")
    return [text.strip() for text in found.all_inner_texts()]


def ask(page: Any, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def test_both_models_answer_side_by_side(
    browser: Any, address: str, models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "photo.png")
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.set_input_files("input[type=file]", str(image))
    page.get_by_role("button", name="Remove Image").wait_for()
    first, second = "Which digit is this?", "Sure?"
    ask(page, first)
    page.get_by_text("overview").nth(1).wait_for()
    expected = [answer(model, first, image, max_new_tokens=8) for model in models.values()]
    assert answers(page, 2) == [text.strip() for text in expected]
    assert page.get_by_label("Question").input_value() == ""

    # The second question follows the first.
    ask(page, second)
    for number, (model, text) in enumerate(zip(models.values(), expected, strict=True)):
        try:
            text = answer(model, second, image, earlier=[(first, text)], max_new_tokens=8)
        except UserError:
            text = "Not asked, since its earlier answers cannot be part of a prompt"
        assert answers(page, 4)[2 * number + 1].startswith(text.strip())

    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    page.get_by_role("button", name="Start over").click()
    page.get_by_test_id("bot").first.wait_for(state="detached")


def test_a_question_may_have_no_image(browser: Any, address: str, models: dict[str, LoadedModel]) -> None:
    page = browser.new_page()
    page.goto(address)
    ask(page, "Which?")
    assert answers(page, 2) == [answer(model, "Which?", max_new_tokens=8).strip() for model in models.values()]


@pytest.mark.parametrize(
    ("question", "words"),
    [("an <|im_end|> inside", "special token <|im_end|>"), (" ", "Write a question.")],
    ids=["token", "empty"],
)
def test_a_mistake_is_shown_and_covers_nothing(browser: Any, address: str, question: str, words: str) -> None:
    page = browser.new_page()
    page.goto(address)
    ask(page, question)
    page.get_by_text(words).wait_for()
    assert page.get_by_label("Question").is_visible()
    assert page.get_by_text("Error", exact=True).count() == 1  # the heading of the message


@pytest.mark.parametrize(
    ("content", "words"), [(None, "more than the 1,000 pixels allowed"), (b"none", "not a readable image")]
)
def test_an_image_that_cannot_be_used_is_refused(
    browser: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = write_image(tmp_path / "photo.png", (80, 50))  # what is known of an image that was seen before is kept
    if content:
        image.write_bytes(content)
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("input[type=file]", str(image))
    page.get_by_role("button", name="Remove Image").wait_for()
    ask(page, "Which?")
    page.get_by_text(words).wait_for()
