"""The page of environment variables is what the table in the package gives."""

from docs.environment_table import PATH, page
from minicpmv_finetune.environment import VARIABLES


def test_page_matches_the_table() -> None:
    assert PATH.read_text() == page(), "run make readmes"


def test_every_variable_is_listed_once() -> None:
    text = page()
    assert [text.count(f"| `{variable.name}` |") for variable in VARIABLES] == [1] * len(VARIABLES)
