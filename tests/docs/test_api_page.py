"""What docs/api.md names is in the module that it links, and is described there completely.

The source is parsed and not imported, as the site does it.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "api.md"
NAMES = re.findall(r"^\| \[`(\w+)`\]\(([^)]+\.py)\)", PAGE.read_text(), re.MULTILINE)


def _definition(name: str, module: Path) -> ast.FunctionDef | ast.ClassDef:
    (found,) = (
        node
        for node in ast.parse(module.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    )
    return found


@pytest.mark.parametrize(("name", "link"), NAMES, ids=[name for name, _ in NAMES])
def test_a_name_of_the_page_is_described_with_its_arguments(name: str, link: str) -> None:
    found = _definition(name, PAGE.parent / link)
    text = ast.get_docstring(found) or ""
    assert text.partition("\n")[0].endswith("."), f"{name}: its first line is no sentence"
    if isinstance(found, ast.ClassDef):
        assert "Attributes:\n" in text
        return
    arguments = [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs]
    described = set(re.findall(r"^    \*?(\w+): ", text.partition("Args:\n")[2], re.MULTILINE))
    assert not {argument.arg for argument in arguments} - described
    returns = ast.unparse(found.returns) if found.returns else "None"
    # A first line that begins with the result, such as "The metric of this name.", says what is returned.
    assert returns == "None" or "Returns:\n" in text or text.startswith(("The ", "A "))


def test_published_names_are_on_the_page() -> None:
    assert {"load", "answer"} <= {name for name, _ in NAMES}
    assert len(NAMES) > 30
