"""The check of a release's tag and the extraction of its notes from the changelog."""

import subprocess
import sys
import tomllib

import pytest

from docs.release_notes import check_tag, notes_of
from tests.docs.pages import ROOT

_CHANGELOG = """# Changelog

## 0.3.0 (unreleased)

- Not yet.

## 0.2.0 (2026-11-30)

- A package.

### Moved

- `a` to `b`.

## 0.1.0 (2026-11-25)
"""


def test_notes_are_the_text_below_the_heading() -> None:
    assert notes_of("0.2.0", _CHANGELOG) == "- A package.\n\n### Moved\n\n- `a` to `b`.\n"


@pytest.mark.parametrize(
    ("version", "sentence"),
    [("0.3.0", "has no date"), ("0.1.0", "nothing is written"), ("0.4.0", "no heading for 0.4.0")],
)
def test_notes_that_are_not_ready_are_refused(version: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        notes_of(version, _CHANGELOG)


def test_tag_must_name_the_version() -> None:
    pyproject = '[project]\nversion = "0.2.0"\n'
    assert check_tag("v0.2.0", pyproject) == "0.2.0"
    for tag in ("0.2.0", "v0.2.1", "v0.2.0rc1"):
        with pytest.raises(ValueError, match=tag):
            check_tag(tag, pyproject)


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {version} (")


def test_a_wrong_tag_ends_the_script_with_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "release_notes.py"), "v9.9.9"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("release_notes: tag v9.9.9: pyproject.toml has version")
    assert "Traceback" not in done.stderr
