"""Text in the summaries as the Kubeflow UI's Markdown shows it."""

from minicpmv_finetune.components.validate_data.report import markdown
from minicpmv_finetune.data.samples import DatasetInfo
from minicpmv_finetune.reports.markdown import escape
from tests.example_record import example_record


def test_no_mark_is_taken_for_formatting() -> None:
    assert escape("peak_memory_mb <b>\n*x*") == r"peak\_memory\_mb &lt;b&gt; \*x\*"


def test_names_in_the_tables_keep_their_underscores() -> None:
    info = DatasetInfo(fingerprint="0", rows={"train": 2, "eval": 1}, rejected={"image_missing": 3}, noted={})
    assert "| `image_missing` | 3 |" in markdown(info)
    record = example_record(metrics={"loss": 0.5, "peak_memory_mb": 7.0}, history=[{"loss": 0.25, "step": 1}])
    text = record.markdown()
    assert "| `final_loss` | 0.25 |" in text
    assert "| `mean_loss` | 0.5 |" in text
    assert "| `peak_memory_mb` | 7 |" in text
    assert "| loss |" not in text
