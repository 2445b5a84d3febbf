"""The benchmarks on public data, without a registry: conversion, splits, and the table of results."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minicpmv_finetune.components.evaluate.metrics import METRICS
from minicpmv_finetune.data.texts import read_texts
from minicpmv_finetune.errors import UserError
from tests.warm_processes import warm_steps

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def test_a_task_becomes_data_in_this_projects_format(tmp_path: Path) -> None:
    from public.task import Asked, AskedImage, Task, encode_png, prepare

    def images(split: str, packages: Mapping[str, Path]) -> Iterator[AskedImage]:
        for gray in range(5):
            content = encode_png(Image.fromarray(np.full((4, 4), gray, np.uint8)))
            yield AskedImage(content, (Asked("How gray?", str(gray), "gray"), Asked("Read.", "none", "text", "cer")))

    task = Task("gray", "gray images", {}, images, {})
    data = prepare(task, tmp_path / "data", limit=3)
    assert dict(data.counts) == {
        "train images": 3,
        "train questions": 6,
        "test images": 3,
        "test questions": 6,
    }
    assert set(data.tests) == {"scores", "errors"}, "error rates cannot be averaged with scores"
    assert {"0", "1", "2", "none"} <= set(read_texts(str(data.train)))
    lines = [json.loads(line) for line in data.tests["errors"].read_text().splitlines()]
    assert {METRICS[line["metric"]].lower_is_better for line in lines} == {True}
    archive, _, member = lines[2]["image"].partition("!")
    with tarfile.open(data.train.parent / archive) as tar:
        content = tar.extractfile(member)
        assert content
        assert Image.open(content).getpixel((0, 0)) == 2
    before = data.train.stat().st_mtime_ns
    assert prepare(task, tmp_path / "data", limit=3).train.stat().st_mtime_ns == before, "it is not converted again"
    assert prepare(task, tmp_path / "data", limit=2).counts["train images"] == 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("time", "one o’clock"), ("time", "twelve-thirty"), True),
        (("person-role", "man firefighter"), ("person-role", "woman firefighter"), True),
        (("person-sport", "person running: facing right"), ("person-sport", "man running"), True),
        (("food-fruit", "red apple"), ("food-fruit", "green apple"), False),
    ],
)
def test_emoji_of_one_design_are_one_family(one: tuple[str, str], other: tuple[str, str], same: bool) -> None:
    from public.emoji import family_of

    families = [family_of({"subgroups": group, "annotation": name}) for group, name in (one, other)]
    assert (families[0] == families[1]) == same


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    from public.registries import Package, _check

    file = tmp_path / "data.whl"
    file.write_bytes(b"other")
    with pytest.raises(UserError, match=r"PyPI data 1\.0: data\.whl has the sha256 d9298a10"):
        _check(Package("PyPI", "data", "MIT", "1.0", ("0" * 64,)), file)
    assert not file.exists()


def test_the_page_has_the_rows_of_the_results() -> None:
    from public.rows import BEGIN, END, PAGE, read_rows, tables

    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == tables(read_rows()).strip()


def test_every_task_has_a_target_and_a_line_on_the_page() -> None:
    from public.rows import PAGE
    from public.tasks import TASKS

    makefile = (ROOT / "Makefile").read_text()
    for name, task in TASKS.items():
        assert f"\nbenchmark-{name}: install" in makefile
        assert f"| {name} |" in PAGE.read_text()
        for package in task.packages.values():
            assert f"`{package.name}`" in PAGE.read_text()
            assert package.license in PAGE.read_text()


def test_scores_are_per_metric_with_an_interval(tmp_path: Path) -> None:
    from public.rows import blind_answers, score_answers

    train = tmp_path / "train.jsonl"
    turns = [[{"content": "<image>\nWhat?"}, {"content": answer}] for answer in ("ab", "x", "ab")]
    train.write_text("".join(json.dumps({"conversations": one}) + "\n" for one in turns))

    def line(metric: str, score: float, tag: str) -> dict[str, Any]:
        scores = {"base": {metric: 0.0}, "tuned": {metric: score}}
        question = "What?" if tag == "a" else "Who?"
        return {"metric": metric, "scores": scores, "tags": [tag], "expected": ["ab"], "question": question}

    lines = [line("anls", 0.9, "a"), line("anls", 0, "b"), line("cer", 0.5, "a"), line("cer", 0.5, "a")]
    found = score_answers(lines, blind_answers(train))
    figures = {"samples": 2, "base": 0, "blind": 0.5, "tuned": 0.45, "low": 0, "high": 0.9}
    by_tag = {"blind_by_tag": {"a": 1, "b": 0}, "tuned_by_tag": {"a": 0.9, "b": 0}}
    assert found["anls"] == figures | by_tag, "a question that training does not have has no blind answer"
    assert found["cer"]["tuned"] == 0.5


def test_a_benchmark_runs_from_its_package_to_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a registry: matplotlib contains the fonts, except for Chinese, which it draws as boxes."""
    import matplotlib
    import on_public_data
    from public import documents
    from public.registries import Fetched
    from public.rows import tables
    from public.task import prepare

    found = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = tmp_path / "usr" / "share" / "fonts" / "truetype"
    fonts.mkdir(parents=True)
    (fonts / "dejavu").symlink_to(found)
    (fonts / "wqy").mkdir()
    (fonts / "wqy" / "wqy-microhei.ttc").symlink_to(found / "DejaVuSans.ttf")
    monkeypatch.setattr("public.task.fetch", lambda package: Fetched(tmp_path, f"{package.name}.deb", "0" * 64))
    monkeypatch.chdir(tmp_path)
    budget = {"num_train_epochs": 1.0, "per_device_train_batch_size": 2, "evaluation_options": {"max_new_tokens": 4}}
    task = replace(documents.TASK, inputs={**documents.TASK.inputs, **budget})
    data = prepare(task, tmp_path / "data", limit=8)
    packages = json.loads((tmp_path / "data" / "provenance.json").read_text())["origin"]["packages"]
    assert [package["license"] for package in packages] == ["Bitstream-Vera", "Apache-2.0"]
    with warm_steps():
        row = on_public_data.run_task(task, data, tmp_path / "run", seed=1)
    assert {metric: score["samples"] for metric, score in row["scores"].items()} == {
        "json_fields": 4,
        "teds": 4,
        "cer": 8,
    }
    assert set(row["scores"]["cer"]["tuned_by_tag"]) == {
        f"{what}, {code}" for what in ("receipt", "table") for code in documents.LANGUAGES
    }
    assert row["peak_bytes"] > 1e8
    assert f"| {documents.TASK.title} | 16 × 1 | 8 | `cer` |" in tables([row])
    assert "Right" in (tmp_path / "run" / "report.html").read_text()
