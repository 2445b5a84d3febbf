"""The message that a real web server receives from notify."""

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.components.notify.notify import notify
from minicpmv_finetune.errors import RetryableError, UserError
from tests.servers import Webhook


@pytest.fixture(autouse=True)
def one_run_without_waits(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline run without tracking, and no waits between attempts."""
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    monkeypatch.delenv(environment.TRACKING_URI.name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_the_outcome_is_posted(webhook: Webhook) -> None:
    assert notify("minicpmv-retrain", "FAILED", "train failed")
    assert webhook.received == [
        {
            "text": "minicpmv-retrain: failed, train failed (run run-7)",
            "pipeline": "minicpmv-retrain",
            "run": "run-7",
            "state": "FAILED",
            "outcome": "train failed",
        }
    ]


def test_a_failed_post_is_repeated(webhook: Webhook) -> None:
    webhook.answers = [503, 429, 200]
    notify("minicpmv-retrain", "SUCCEEDED")
    assert [message["state"] for message in webhook.received] == ["SUCCEEDED"]


@pytest.mark.parametrize(("status", "kind"), [(503, RetryableError), (404, UserError)])
def test_an_error_answer_is_an_error_without_the_address(
    webhook: Webhook, status: int, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    webhook.answers = [status]
    with pytest.raises(kind) as raised:
        notify("minicpmv-retrain", "SUCCEEDED")
    assert str(status) in str(raised.value)
    assert "secret-path" not in str(raised.value) + capsys.readouterr().err


def test_an_unreachable_webhook_is_an_error_without_the_address(
    webhook: Webhook, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.WEBHOOK_URL.name, f"{unreachable}/secret-path")
    with pytest.raises(RetryableError) as raised:
        notify("minicpmv-retrain", "SUCCEEDED")
    assert "secret-path" not in str(raised.value)


def test_without_a_webhook_nothing_is_posted(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.WEBHOOK_URL.name)
    assert not notify("minicpmv-retrain", "SUCCEEDED")


def test_only_web_addresses_are_accepted(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WEBHOOK_URL.name, "file:///etc/hostname")
    with pytest.raises(UserError, match="not a valid web address"):
        notify("minicpmv-retrain", "SUCCEEDED")


@pytest.mark.parametrize("address", ["https://user:hidden@webhook.example", "http://webhook.example:hidden/path"])
def test_an_invalid_address_is_an_error_without_the_address(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv(environment.WEBHOOK_URL.name, address)
    with pytest.raises(UserError, match="not a valid web address") as raised:
        notify("minicpmv-retrain", "SUCCEEDED")
    assert "hidden" not in str(raised.value)
