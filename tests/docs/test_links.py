"""Every link of the documentation leads to a file, and to a heading in it where it names one."""

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links, name_of


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        # GitHub follows no link of the file system, such as `components` at the top level.
        found = (page.parent / path).absolute() if path else page
        resolved = found.resolve()
        assert found.exists(), f"{target}: no such file"
        assert Path(resolved).is_relative_to(ROOT), f"{target}: leads out of the repository"
        assert not any(parent.is_symlink() for parent in [found, *found.parents] if parent != ROOT), (
            f"{target}: goes through a link of the file system; give the real path"
        )
        if anchor:
            assert anchor in anchors(resolved.read_text()), f"{target}: no such heading"


def test_every_page_of_docs_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in links(page.read_text())
        if "://" not in target
    }
    assert not [name_of(page) for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in linked]
