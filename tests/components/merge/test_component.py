"""The artifacts that Kubeflow shows for a merge."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from minicpmv_finetune.components.merge import merge as module
from minicpmv_finetune.components.merge.component import merge as component
from minicpmv_finetune.components.merge.report import MergeReport


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> MergeReport:
    """The report that the component gets in place of a real merge."""
    report = MergeReport(
        base_model="base",
        generation="4.6",
        data_fingerprint="0",
        kind="adapter",
        bytes=1,
        moved={},
        changed={"w": 0.5},
        untied=False,
        memory=None,
        seconds={},
    )

    def merge(*arguments: Any) -> MergeReport:
        arguments[4].write_text(report.model_dump_json())
        return report

    monkeypatch.setattr(module, "merge", merge)
    return report


def merged_model(tmp_path: Path, metadata: dict[str, Any]) -> dsl.Model:
    """The output artifact of the component for an adapter with this metadata."""
    model = dsl.Model(uri=str(tmp_path / "model"))
    component.python_func(
        base_model_uri="base",
        adapter=dsl.Model(uri=str(tmp_path / "adapter"), metadata=metadata),
        shards=dsl.Dataset(uri=str(tmp_path / "shards")),
        model=model,
        merge_summary=dsl.Markdown(uri=str(tmp_path / "summary")),
        merge_report=dsl.HTML(uri=str(tmp_path / "report")),
    )
    return model


def test_the_merged_model_has_its_own_display_name(tmp_path: Path, report: MergeReport) -> None:
    of_kubeflow = {"display_name": "adapter", "store_session_info": "{}", "tenant": "kubeflow"}
    facts = {"generation": "4.6", "base_model": "base", "use_lora": True}
    assert merged_model(tmp_path, {**of_kubeflow, **facts}).metadata == {
        **facts,
        "adapter_uri": str(tmp_path / "adapter"),
        "display_name": "merged model",
    }


def test_the_report_is_a_page_and_its_numbers_are_beside_the_model(tmp_path: Path, report: MergeReport) -> None:
    merged_model(tmp_path, {})
    assert "<strong>1</strong> <span>tensor changed" in (tmp_path / "report").read_text()
    assert json.loads((tmp_path / "merge-report.json").read_text())["changed"] == {"w": 0.5}


def test_an_adapter_without_metadata_can_be_merged(tmp_path: Path, report: MergeReport) -> None:
    assert merged_model(tmp_path, {}).metadata == {
        "adapter_uri": str(tmp_path / "adapter"),
        "display_name": "merged model",
    }


def test_a_model_in_a_store_that_another_one_replaces_is_named(report: MergeReport, tmp_path: Path) -> None:
    place = tmp_path / "model.merge-report.json"
    assert module.describe_replaced(str(place), report) == ""
    place.write_text(report.model_copy(update={"seconds": {"streaming": 3.0}}).model_dump_json())
    assert module.describe_replaced(str(place), report) == ""
    for change in ({"changed": {"w": 0.4}}, {"data_fingerprint": "1"}):
        other = report.model_copy(update=change)
        place.write_text(other.model_dump_json())
        replaced = f"--base-model base and the data {other.data_fingerprint}"
        assert module.describe_replaced(str(place), report) == replaced
    place.write_text("{}")
    assert module.describe_replaced(str(place), report) == "another version of this program"
