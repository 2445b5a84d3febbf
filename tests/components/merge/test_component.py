"""The artifacts that Kubeflow shows for a merge."""

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
    monkeypatch.setattr(module, "merge", lambda *arguments: report)
    return report


def merged_model(tmp_path: Path, metadata: dict[str, Any]) -> dsl.Model:
    """The output artifact of the component for an adapter with this metadata."""
    model = dsl.Model(uri=str(tmp_path / "model"))
    component.python_func(
        base_model_uri="base",
        adapter=dsl.Model(uri=str(tmp_path / "adapter"), metadata=metadata),
        shards=dsl.Dataset(uri=str(tmp_path / "shards")),
        model=model,
        report=dsl.Artifact(uri=str(tmp_path / "report")),
        metrics=dsl.Metrics(uri=str(tmp_path / "metrics")),
        summary=dsl.Markdown(uri=str(tmp_path / "summary")),
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


def test_an_adapter_without_metadata_can_be_merged(tmp_path: Path, report: MergeReport) -> None:
    assert merged_model(tmp_path, {}).metadata == {
        "adapter_uri": str(tmp_path / "adapter"),
        "display_name": "merged model",
    }
