"""Promotion and rollback by hand, through the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minicpmv_finetune.cli import main
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.tracking.promotion_record import PromotionRecord
from minicpmv_finetune.tracking.registry import open_registry


def output_of(*arguments: str) -> str:
    done = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.strip()


def register(uri: str) -> None:
    open_registry("model").register(
        PromotionRecord(
            promote=True,
            reason="better than the base model",
            model_uri=uri,
            base_model="base",
            generation="4.6",
            data_fingerprint="0",
            metric="exact_match",
            metrics={},
        )
    )


def test_promote_and_rollback_log_their_reason(database: Path) -> None:
    register("s3://models/1")
    register("s3://models/2")
    promoted = output_of("promote", "1", "--model", "model", "--reason", "first")
    assert promoted == "champion of model: version 1, the first one (the gate's reason: better than the base model)"
    output_of("promote", "2", "--model", "model", "--reason", "newer")
    back = output_of("rollback", "--model", "model", "--reason", "wrong dates")
    assert back == "champion of model: version 1 again, before it was version 2"
    assert [move.reason for move in open_registry("model").moves()] == [
        "by hand: first",
        "by hand: newer",
        "by hand: wrong dates",
    ]


def test_an_impossible_promotion_or_rollback_is_a_user_error(database: Path) -> None:
    register("s3://models/1")
    for arguments in (["promote", "7"], ["rollback"], ["promote", "first"]):
        done = CliRunner().invoke(main.app, [*arguments, "--model", "model", "--reason", "why"])
        assert isinstance(done.exception, UserError), done.exception


def test_a_run_does_not_start_while_the_registry_is_down(
    tmp_path: Path, digits: Path, tiny_46: Path, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", unreachable)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    inputs = ["--data", str(digits / "train.json"), "--base-model", str(tiny_46)]
    arguments = ["run", *inputs, "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main.app, arguments)
    assert isinstance(done.exception, RetryableError), done.exception
    assert not (tmp_path / "run" / "artifacts").exists()
