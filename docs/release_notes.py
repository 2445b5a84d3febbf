"""Print the notes of one release from CHANGELOG.md, after a check that the tag names the version of pyproject.toml.

    python docs/release_notes.py v0.2.0 > notes.md

`.github/workflows/release.yml` runs this file before it publishes anything. It needs nothing but Python 3.11.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check_tag(tag: str, pyproject: str) -> str:
    """Return the version that a tag names.

    Args:
        tag: Name of the tag, such as `v0.2.0`.
        pyproject: Content of pyproject.toml.

    Raises:
        ValueError: The tag does not name the project's version.
    """
    version = str(tomllib.loads(pyproject)["project"]["version"])
    if tag != f"v{version}":
        raise ValueError(f"tag {tag}: pyproject.toml has version {version}; tag v{version}, or change that version.")
    return version


def notes_of(version: str, changelog: str) -> str:
    """Return the text below a version's heading in the changelog, without the heading.

    Raises:
        ValueError: The changelog has no such heading, the version has no date yet, or nothing is written below it.
    """
    parts = re.split(r"^## (.+)\n", changelog, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for heading, text in sections.items():
        if heading.split()[0] != version:
            continue
        if not re.fullmatch(r"\S+ \(\d{4}-\d{2}-\d{2}\)", heading):
            raise ValueError(f"CHANGELOG.md: the heading {heading!r} has no date; write '## {version} (YYYY-MM-DD)'.")
        if not text.strip():
            raise ValueError(f"CHANGELOG.md: nothing is written below {heading!r}; list what changed.")
        return text.strip() + "\n"
    raise ValueError(f"CHANGELOG.md: no heading for {version}; write '## {version} (YYYY-MM-DD)' and what changed.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/release_notes.py TAG")
    try:
        wanted = check_tag(sys.argv[1], (ROOT / "pyproject.toml").read_text())
        print(notes_of(wanted, (ROOT / "CHANGELOG.md").read_text()), end="")
    except ValueError as error:
        sys.exit(f"release_notes: {error}")
