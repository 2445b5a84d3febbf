"""The page of pipeline inputs is what the table in the package gives."""

from docs.inputs_table import PATH, page
from minicpmv_finetune.inputs.table import INPUTS


def test_page_matches_the_table() -> None:
    assert PATH.read_text() == page(), "run make readmes"


def test_every_input_is_listed_once() -> None:
    assert [page().count(f"| `{name}` |") for name in INPUTS] == [1] * len(INPUTS)
