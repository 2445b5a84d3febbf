"""A page in Chinese says what its page in English says: equal blocks, code, links and parts, in the same order."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks, links, name_of, prose, spans

CHINESE = ".zh-CN"
TRANSLATED = [page for page in PAGES if page.stem.endswith(CHINESE)]


def english(page: Path) -> Path:
    return page.with_name(page.name.replace(CHINESE, ""))


def targets(page: Path) -> list[str]:
    """The links of a page, as if every page that has a translation were in English; the language links left out."""
    found = [target.replace(CHINESE, "") for target in links(page.read_text())]
    found = [target for target in found if target != english(page).name]
    # The headings of a translated page are translated too.
    pages = {english(translated).name for translated in TRANSLATED}
    return [target.partition("#")[0] if Path(target.partition("#")[0]).name in pages else target for target in found]


@pytest.mark.parametrize("page", TRANSLATED, ids=name_of)
class TestATranslation:
    def test_has_the_same_blocks(self, page: Path) -> None:
        assert [(block.language, block.text) for block in blocks(page.read_text())] == [
            (block.language, block.text) for block in blocks(english(page).read_text())
        ]

    def test_has_the_same_links_in_the_same_order(self, page: Path) -> None:
        assert targets(page) == targets(english(page))

    def test_names_the_same_code(self, page: Path) -> None:
        assert sorted(spans(page.read_text())) == sorted(spans(english(page).read_text()))

    def test_has_the_same_parts(self, page: Path) -> None:
        def parts(text: str) -> list[str]:
            return re.findall(r"^(#+ |\|(?!-)|\d\. |- )", prose(text), re.MULTILINE)

        assert parts(page.read_text()) == parts(english(page).read_text())

    def test_each_leads_to_the_other(self, page: Path) -> None:
        assert english(page).name in links(page.read_text())
        assert page.name in links(english(page).read_text())

    def test_is_written_in_chinese(self, page: Path) -> None:
        for paragraph in re.split(r"\n\s*\n", re.sub(r"`[^`]*`|\([^)]*\)", "", prose(page.read_text()))):
            letters, characters = re.findall(r"[A-Za-z]", paragraph), re.findall(r"[一-鿿]", paragraph)
            assert characters or len(letters) < 40, paragraph


def test_there_are_translations() -> None:
    assert {name_of(page) for page in TRANSLATED} == {"README.zh-CN.md", "docs/tutorial.zh-CN.md"}
