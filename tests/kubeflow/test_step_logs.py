"""What people read of a log: the step's own lines, and the sentence that says why it failed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from minicpmv_finetune.kubeflow import step_logs
from minicpmv_finetune.kubeflow.client import Cluster
from minicpmv_finetune.kubeflow.run_steps import list_steps
from minicpmv_finetune.kubeflow.step_logs import last_error, stored_sentence, without_launcher
from tests.kubeflow.recorded import FOLDER, read_run

MISTAKE = "s3://datasets/digits/none.json: nothing lies there; check the path or URI."
LAUNCHER = "F1126 01:16:33.406910      15 main.go:130] failed to execute component: "


def test_the_launchers_lines_and_documents_are_left_out() -> None:
    log = (FOLDER / "log-mistake.txt").read_text()
    assert len(log.splitlines()) > 90
    assert without_launcher(log) == f"error: {MISTAKE}\n"
    assert last_error(log) == MISTAKE


def test_what_launcher_and_argo_print_after_a_success_is_left_out() -> None:
    log = (FOLDER / "log-success.txt").read_text()
    assert without_launcher(log) == "→ 1,497 samples to train on, 300 to evaluate, 0 rejected\n"


def test_warnings_and_errors_of_the_launcher_stay() -> None:
    log = (
        "[KFP Executor 2026-11-26 01:16:31,161 WARNING]: slow store\n"
        "epoch 1\n"
        "E1126 01:16:33.386282      15 launcher_v2.go:449] failed to upload output artifact\n"
        f"{LAUNCHER}exit status 2\n"
        "Error: exit status 1\n"
    )
    assert without_launcher(log).splitlines() == log.splitlines()[:3]


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            "error: first\nerror: 2 inputs are wrong.\n- a: bad.\n- b: bad.\nI1126\n",
            "2 inputs are wrong. a: bad. b: bad.",
        ),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'shards'\n", "KeyError: 'shards'"),
        (
            "botocore.exceptions.NoCredentialsError: Unable to locate\n",
            "botocore.exceptions.NoCredentialsError: Unable to locate",
        ),
        (f"epoch 1\n{LAUNCHER}signal: killed\n", "signal: killed"),
        (f"epoch 1\n{LAUNCHER}exit status 1\n", ""),
        ("", ""),
    ],
)
def test_the_reason_of_a_failure_is_the_last_one_that_the_log_names(log: str, sentence: str) -> None:
    assert last_error(log) == sentence


def test_a_part_has_its_own_sentence_and_no_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run("partitions")
    parts = {row.step: row for row in list_steps(run) if row.name == "preprocess-part"}
    assert sorted(parts) == ["preprocess-part[0]", "preprocess-part[1]"]
    monkeypatch.setattr(step_logs, "run_folder", lambda profile, run: str(tmp_path))
    monkeypatch.setattr(step_logs, "use_store", lambda profile: None)
    cluster = cast("Cluster", SimpleNamespace(profile=None))
    marker = tmp_path / "preprocess-part" / "execution-0" / "permanent_error.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"inputs": "", "message": "part 0's"}))
    record = {"step": "preprocess-part[0]", "sentence": "part 0's", "exit_code": 2}
    (tmp_path / "failed_steps").mkdir()
    (tmp_path / "failed_steps" / "preprocess-part-0.json").write_text(json.dumps(record))
    found = [stored_sentence(cluster, run, parts[f"preprocess-part[{number}]"]) for number in (0, 1)]
    assert found == ["part 0's", ""]
