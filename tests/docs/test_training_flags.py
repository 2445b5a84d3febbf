"""The table of training flags is what the training script's parser gives."""

from docs.training_flags import table
from minicpmv_finetune.components.train.flags import TABLE_PATH


def test_the_table_matches_the_parser() -> None:
    assert TABLE_PATH.read_text() == table(), "run make readmes"
