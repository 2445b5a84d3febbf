"""The page of recipes is what `plan` says of the recipes in the package."""

from docs.recipes_table import PATH, page


def test_page_matches_the_recipes() -> None:
    assert PATH.read_text() == page(), "run make readmes"
