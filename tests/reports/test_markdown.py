"""Text in the summaries as the Kubeflow UI's Markdown shows it."""

from pathlib import Path

from minicpmv_finetune.components.validate_data.report import markdown
from minicpmv_finetune.data.samples import DatasetInfo
from minicpmv_finetune.reports.markdown import escape, with_code, write_summary
from tests.example_record import example_record


def test_no_mark_is_taken_for_formatting() -> None:
    assert escape("peak_memory_mb <b>\n*x*") == r"peak\_memory\_mb &lt;b&gt; \*x\*"


def test_quotation_marks_and_addresses_stay_as_they_are() -> None:
    assert escape('the base\'s "0" at http://host/a_b: no_b') == 'the base\'s "0" at http://host/a_b: no\\_b'


def test_names_and_json_in_a_help_text_become_code() -> None:
    text = 'Flags, such as {"a_b": {"c": 1}}; "num_nodes" above 1, or use_lora false.'
    assert with_code(text) == 'Flags, such as `{"a_b": {"c": 1}}`; `"num_nodes"` above 1, or `use_lora` false.'


def test_columns_of_a_summary_are_apart(tmp_path: Path) -> None:
    write_summary(str(tmp_path / "summary"), "a | b\n\n| | base |\n|---|---|\n| x \\| y | 0.0% |\n")
    gap = "\u00a0" * 3
    rows = f"|{gap} | base{gap} |\n|---|---|\n| x \\| y{gap} | 0.0%{gap} |\n"
    assert (tmp_path / "summary").read_text() == f"a | b\n\n{rows}"


def test_names_in_the_tables_keep_their_underscores() -> None:
    info = DatasetInfo(fingerprint="0", rows={"train": 2, "eval": 1}, rejected={"image_missing": 3}, noted={})
    assert "| `image_missing` | 3 |" in markdown(info)
    record = example_record(metrics={"loss": 0.5, "peak_memory_mb": 7.0}, history=[{"loss": 0.25, "step": 1}])
    text = record.markdown()
    assert "| `final_loss` | 0.25 |" in text
    assert "| `mean_loss` | 0.5 |" in text
    assert "| `peak_memory_mb` | 7 |" in text
    assert "| loss |" not in text
