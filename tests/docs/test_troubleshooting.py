"""Each symptom of docs/troubleshooting.md is a message of the program."""

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SYMPTOMS = re.findall(r"^\| `(.+?)` \| ", PAGE, re.MULTILINE)
SHORTEST = 8  # characters of a part that is searched


@cache
def messages() -> list[str]:
    """Every text in the package's source, with an ellipsis in place of each value."""
    found = []
    for path in (ROOT / "minicpmv_finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_message(symptom: str) -> bool:
    """Whether one text of the source contains the parts of a symptom in this order."""
    pattern = ".*".join(re.escape(part.strip()) for part in symptom.split("…"))
    return any(re.search(pattern, text, re.DOTALL) for text in messages())


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_each_symptom_is_a_message_of_the_program(symptom: str) -> None:
    assert max(len(part.strip()) for part in symptom.split("…")) >= SHORTEST
    assert is_message(symptom)


def test_the_page_has_all_areas_and_a_wrong_message_is_noticed() -> None:
    assert len(SYMPTOMS) > 55
    assert len(set(SYMPTOMS)) == len(SYMPTOMS)
    assert not is_message("no such message of the program")
