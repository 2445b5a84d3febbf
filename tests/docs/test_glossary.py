"""The glossary's terms are explained once, in order, and linked where a page first uses them."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, prose

GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"^## (.+)\n\n((?:.+\n)+)\n((?:.+\n)+)", re.MULTILINE)
ENTRIES = ENTRY.findall(GLOSSARY.read_text())
GENERATED = {"environment.md", "inputs.md", "recipes.md"}
ENGLISH = [path for path in sorted((ROOT / "docs").glob("*.md")) if ".zh-" not in path.name]
PAGES = [path for path in ENGLISH if path.name not in {GLOSSARY.name, *GENERATED}]
# How a term is written in a sentence, where that is not the term with an optional plural.
WRITTEN = {
    "archive": r"tar archives?",
    "artifact": r"artifacts?",
    "base model": r"base models?",
    "cache key": r"cache keys?",
    "exact match": r"exact_match",
    "manifest": None,  # a Kubernetes manifest is another thing
    "McNemar test": r"McNemar's test|McNemar test",
    "patch": None,
    "promotion": None,  # part of "promotion record"
    "sample": None,  # in nearly every sentence
    "step": None,
    "dataset": None,
    "generation": None,
    "pipeline input": None,
    "reject": None,
    "resampler or merger": None,
}


def test_terms_are_in_order_and_explained_in_a_few_lines() -> None:
    names = [name for name, _, _ in ENTRIES]
    assert len(names) == GLOSSARY.read_text().count("\n## ")
    assert names == sorted(names, key=str.lower)
    for name, text, modules in ENTRIES:
        assert len(text.splitlines()) <= 3, name
        assert modules.startswith("In ["), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_term_is_linked_where_a_page_first_uses_it(page: Path) -> None:
    text = re.sub(r"^#.*$", "", prose(page.read_text()), flags=re.MULTILINE)
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "`code`", text)
    for name, _, _ in ENTRIES:
        pattern = WRITTEN.get(name, rf"{re.escape(name)}s?")
        if pattern is None:
            continue
        first = re.search(rf"\b({pattern})\b", text, re.IGNORECASE)
        if first:
            anchor = name.lower().replace(" ", "-")
            linked = re.match(rf"[^\]\[]*\]\(glossary\.md#{anchor}\)", text[first.start() :])
            assert linked, f"{name}: not linked at {text[first.start() - 30 : first.end() + 30]!r}"
