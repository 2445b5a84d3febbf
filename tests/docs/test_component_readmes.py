"""The README of each step is what its component's signature and docstring give."""

from typing import Any

import pytest

from docs.component_readmes import COMPONENTS, readme, readme_path
from tests.docs.pages import ROOT


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: str(component.name))
def test_readme_matches_its_component(component: Any) -> None:
    assert readme_path(component).read_text() == readme(component), "run make readmes"


def test_every_step_has_a_readme() -> None:
    folders = {path.parent for path in (ROOT / "minicpmv_finetune" / "components").glob("*/component.py")}
    assert {readme_path(component).parent for component in COMPONENTS} == folders
