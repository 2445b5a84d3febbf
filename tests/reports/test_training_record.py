"""The numbers that the record of a training gives."""

import pytest

from minicpmv_finetune.reports.training_record import mean_loss
from tests.example_record import example_record


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


def test_the_loss_comes_first_in_kubeflows_table() -> None:
    metrics = {"loss": 0.5, "epochs": 3.0, "samples/s": 2.0, "padding": 0.1, "peak_memory_mb": 1.0}
    record = example_record(metrics=metrics, history=[{"loss": 0.25}])
    assert sorted(record.headline)[:2] == ["final_loss", "mean_loss"]
    assert "| `epochs` | 3 |" in record.markdown()


def test_a_large_number_is_no_power_of_ten() -> None:
    record = example_record(metrics={"loss": 0.00001, "peak_memory_mb": 41234.5}, continued_from=1182)
    assert "| `peak_memory_mb` | 41,234 |" in record.markdown()
    assert "| `mean_loss` | 1e-05 |" in record.markdown()
    assert "| Continued | from step 1,182; " in record.markdown()
    assert "Continued" not in example_record().markdown()
