"""The report, opened in a browser."""

from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from minicpmv_finetune.components.evaluate.assessment import Evaluation, assess
from minicpmv_finetune.components.evaluate.gate import Gate
from minicpmv_finetune.components.evaluate.report import format_percent, headline, markdown, write_report
from minicpmv_finetune.data.samples import ImageRef, Sample, Turn
from minicpmv_finetune.minicpmv.answer import Answer
from tests.components.layout import layout_faults
from tests.example_record import example_record

HOSTILE = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\">'\"`{{ 7*7 }}"
FACTS = {"metric": "exact_match", "generation": "4.6", "base_model": HOSTILE, "seconds": 3}


def evaluation_of(
    answers: list[tuple[str, str, str]], image: ImageRef | None = None, base: bool = True, tag: str = "all"
) -> Evaluation:
    """An evaluation of triples: expected answer, answer of the base, answer of the tuned model."""
    samples = [
        Sample(
            id=f"sample-{number}",
            images=(image,) if image else (),
            turns=(Turn(role="user", parts=(f"Question {number}?",)), Turn(role="assistant", parts=(expected,))),
            source="test",
            tags=(tag,),
        )
        for number, (expected, _, _) in enumerate(answers)
    ]
    before = [Answer(text, 3, hit_limit=False) for _, text, _ in answers]
    after = [Answer(text, 3, hit_limit=False) for _, _, text in answers]
    return assess(samples, before if base else None, after, "exact_match")


FOUR = [("cat", "dog", "cat"), ("cat", "cat", "cat"), ("dog", "dog", "cow"), ("dog", "ant", "bee")]


@pytest.fixture
def image(tmp_path: Path) -> ImageRef:
    path = tmp_path / "image.png"
    Image.radial_gradient("L").save(path)
    return ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=256, height=256)


def open_report(page: Page, evaluation: Evaluation, folder: Path) -> int:
    """Open the report of an evaluation; returns its size in bytes."""
    path = folder / "report.html"
    write_report(path, evaluation, FACTS)
    page.goto(path.as_uri())
    return path.stat().st_size


def visible_ids(page: Page) -> list[str]:
    return [text.split()[0] for text in page.locator(".card:visible .id").all_text_contents()]


def test_the_filters_and_the_search_select_cards(page: Page, tmp_path: Path, image: ImageRef) -> None:
    open_report(page, evaluation_of(FOUR, image), tmp_path)
    everything = [f"sample-{number}" for number in range(4)]
    assert visible_ids(page) == everything
    filters = page.get_by_role("group", name="Filter by outcome")
    for title, expected in {
        "Fixed": ["sample-0"],
        "Right before and after": ["sample-1"],
        "Broken": ["sample-2"],
        "Still wrong": ["sample-3"],
        "All": everything,
    }.items():
        filters.get_by_role("button", name=title, exact=True).click()
        assert visible_ids(page) == expected
        assert page.locator("#shown").inner_text() == str(len(expected))
    search = page.get_by_role("searchbox")
    search.fill("COW")
    assert visible_ids(page) == ["sample-2"]
    filters.get_by_role("button", name="Fixed").click()
    assert visible_ids(page) == []
    assert page.get_by_text("No sample matches").is_visible()
    search.press("Escape")
    assert visible_ids(page) == ["sample-0"]
    page.locator(".legend").get_by_role("button", name="broken").click()
    assert visible_ids(page) == ["sample-2"]


def test_the_page_shows_scores_and_images(page: Page, tmp_path: Path, image: ImageRef) -> None:
    open_report(page, evaluation_of(FOUR, image), tmp_path)
    assert page.locator("h1").inner_text().split("\n")[0].startswith("50.0%")
    assert "+0.0 points over the base model’s 50.0%" in page.locator(".gain").inner_text()
    assert page.locator(".matrix").get_by_role("rowheader").all_inner_texts() == ["cat", "dog"]
    assert page.locator(".groups").get_by_role("rowheader").all_inner_texts() == ["all"]
    sizes = page.locator(".card img").evaluate_all(
        "images => Promise.all(images.map((image) => image.decode().then(() => image.naturalWidth)))"
    )
    assert sizes == [256] * 4


def test_texts_from_data_and_models_are_not_executed(page: Page, tmp_path: Path) -> None:
    hostile = [(HOSTILE, HOSTILE, HOSTILE), (HOSTILE, "x", HOSTILE)] * 2
    open_report(page, evaluation_of(hostile, tag=HOSTILE), tmp_path)
    page.get_by_role("searchbox").fill("onerror")
    assert len(visible_ids(page)) == 4
    assert page.title() == "MiniCPM-V 4.6 · evaluation"
    assert page.locator("main script, main img").count() == 0
    assert page.locator(".card .answer span").first.inner_text() == HOSTILE


def test_the_content_policy_blocks_other_scripts(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, evaluation_of(FOUR), FACTS)
    allowed = path.read_text()
    path.write_text(allowed.replace("</main>", "</main><script>document.title='x'</script>"))
    # A page without the checks of the fixture, since the browser reports the blocked script.
    unchecked = browser.new_page()
    unchecked.goto(path.as_uri())
    assert unchecked.title() == "MiniCPM-V 4.6 · evaluation"
    unchecked.close()


def test_without_a_base_answers_are_right_or_wrong(page: Page, tmp_path: Path) -> None:
    open_report(page, evaluation_of(FOUR, base=False), tmp_path)
    page.get_by_role("group", name="Filter by outcome").get_by_role("button", name="Wrong").click()
    assert visible_ids(page) == ["sample-2", "sample-3"]


LABELS = {
    "2 classes": ["yes", "no"],
    "19 classes": [f"color {number}" for number in range(19)],
    "20 classes with long names": [
        f"{'A long name of a kind of document, ' * 6}{number} times" for number in range(20)
    ],
    "60 classes": [f"class {number}" for number in range(60)],
    "300 classes": [f"class {number}" for number in range(300)],
    "names without a blank": ["W" * 500 + str(number) for number in range(8)],
    "Chinese": [character * 14 for character in "红绿蓝黄黑白灰棕紫橙青粉金银铜铁锡铅"],
    "Arabic": [f"{word} {'اللون ' * 9}" for word in "أحمر أخضر أزرق أصفر أسود أبيض رمادي بني وردي".split()],
    "a single sample": ["yes"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_the_page_can_be_read_in_every_window(page: Page, tmp_path: Path, labels: list[str]) -> None:
    answers = [(label, "w x" * 90, labels[0]) for label in labels]
    # Two samples for each class are enough for a confusion matrix; more than 20 classes have none.
    answers *= 2 if 1 < len(labels) <= 20 else 1
    found = evaluation_of(answers, tag=labels[0])
    samples = [prediction.sample for prediction in found.predictions]
    given = [[Answer(text, 3, hit_limit=True) for text in texts] for texts in zip(*answers, strict=True)]
    compared = assess(samples, given[1], given[2], "exact_match", champion=given[1], gate=Gate(0.9, -0.1, -0.2))
    open_report(page, compared, tmp_path)
    assert (page.locator(".matrix").count() == 1) == (2 <= len(labels) <= 20)
    assert layout_faults(page) == []


def test_a_long_answer_is_folded(page: Page, tmp_path: Path) -> None:
    garbage = "x1 y2 " * 128
    open_report(page, evaluation_of([("cat", garbage, "cat")] * 2), tmp_path)
    answer = page.locator(".card .answer").first
    shown = answer.inner_text()
    assert len(shown) < 160
    assert "more" in shown
    answer.get_by_text("more").click()
    assert garbage.strip() in answer.inner_text()
    assert "less" in answer.inner_text()
    page.get_by_role("searchbox").fill("y2 x1 y2")
    assert len(visible_ids(page)) == 2


def test_the_page_of_ten_thousand_samples_is_small(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    # Noise compresses worst.
    Image.effect_noise((640, 640), 90).convert("RGB").save(path)
    noise = ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=640, height=640)
    rare = [("a", "a", "<b>" * 5000)] * 3
    size = open_report(page, evaluation_of([("a", "<b>" * 5000, "a")] * 9997 + rare, noise), tmp_path)
    assert size < 25_000_000
    assert page.locator(".card").count() == 300
    assert page.locator(".card.broken").count() == 3, "the few broken samples are shown among the many fixed"
    assert "10,000" in page.locator("#gallery > .quiet").inner_text()
    page.get_by_role("searchbox").fill("sample-9999")
    assert visible_ids(page) == ["sample-9999"]


def test_the_headline_and_the_table_compare_with_the_base() -> None:
    better = evaluation_of([("cat", "dog", "cat")] * 20 + [("cat", "dog", "dog")] * 20)
    assert headline(better).startswith("Exact match 50.0% on 40 samples: 50.0 points better than the base model's 0.0%")
    assert "| exact match | 0.0% | 50.0% |" in markdown(better)
    assert "fixed 20, right before and after 0, broken 0, still wrong 20." in markdown(better)
    assert "within noise" not in headline(better)
    assert headline(evaluation_of([("cat", "dog", "cat"), ("cat", "cat", "dog"), ("cat", "dog", "cat")])).endswith(
        "33.3 points better than the base model's 33.3%, 95 % interval −100.0 to +100.0, within noise."
    )
    worse = evaluation_of([("cat", "cat", "dog")] * 4)
    assert "100.0 points worse" in headline(worse)
    alone = evaluation_of(FOUR, base=False)
    assert headline(alone) == "Exact match 50.0% on 4 samples."
    assert "base" not in markdown(alone)


def test_only_a_share_of_one_is_shown_as_a_hundred_percent() -> None:
    assert [format_percent(value) for value in (1.0, 0.9996, 0.5)] == ["100.0%", "99.9%", "50.0%"]


def evaluation_with_champion() -> Evaluation:
    found = evaluation_of(FOUR, tag="a|b")
    samples = [prediction.sample for prediction in found.predictions]
    base = [Answer(text, 3, hit_limit=False) for _, text, _ in FOUR]
    tuned = [Answer(text, 3, hit_limit=False) for _, _, text in FOUR]
    champion = [Answer("cat", 3, hit_limit=False)] * 4
    return assess(samples, base, tuned, "exact_match", champion=champion, gate=Gate(0.9, -0.1, -0.2))


def test_the_page_shows_champion_gate_and_curves(page: Page, tmp_path: Path) -> None:
    history = [{"step": float(step), "loss": 3.0 - step} for step in range(3)]
    record = example_record(base_model=HOSTILE, history=history)
    path = tmp_path / "report.html"
    write_report(path, evaluation_with_champion(), FACTS, record)
    page.goto(path.as_uri())
    assert "+0.0 points over the champion’s 50.0%" in page.locator(".gain").nth(1).inner_text()
    assert page.locator(".dot.champion").count() == 1
    decision = page.locator(".decision").inner_text()
    assert decision.startswith("Failed the gate")
    assert "at least 90.0% is required; worse than the champion" in decision
    assert page.locator(".curve h2").all_inner_texts() == ["Training loss"]
    points = page.locator(".curve polyline").get_attribute("points")
    assert points is not None
    assert len(points.split()) == 3
    assert page.locator(".card").nth(1).locator("dt").all_inner_texts() == ["expected", "base", "champion", "tuned"]
    assert page.locator(".groups tbody td").all_inner_texts()[-3:-1] == ["50.0%", "+0.0"]


def test_the_table_contains_the_champion_and_every_rule() -> None:
    text = markdown(evaluation_with_champion())
    assert "| exact match | 50.0% | 50.0% | 50.0% |" in text
    assert text.count("| failed |") == 2
    assert "on a\\|b (" in text, "a tag must not end its cell"
