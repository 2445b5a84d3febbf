"""The numbers that the record of a training gives."""

import pytest

from minicpmv_finetune.reports.training_record import mean_loss


@pytest.mark.parametrize(
    ("history", "mean"),
    [
        ([{"loss": 4.0, "step": 2}, {"eval_loss": 9.0, "step": 2}, {"loss": 1.0, "step": 3}], 3.0),
        ([{"eval_loss": 9.0, "step": 2}], None),
    ],
    ids=["intervals-of-other-lengths", "nothing-logged"],
)
def test_the_mean_loss_of_a_continued_training_counts_every_step(
    history: list[dict[str, float]], mean: float | None
) -> None:
    assert mean_loss(history) == mean
