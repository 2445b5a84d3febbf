"""The message that a real web server receives from notify."""

from pathlib import Path

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.components.notify.notify import describe_end, notify, post
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.reports.markdown import escape
from minicpmv_finetune.run_records import FailedStep, Outcome, working_for, write_failed_step, write_outcome
from tests.servers import Webhook


@pytest.fixture(autouse=True)
def one_run_without_waits(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline run without tracking, and no waits between attempts."""
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    monkeypatch.delenv(environment.TRACKING_URI.name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def write_records(root: Path, outcome: Outcome | None, failed: FailedStep | None) -> str:
    """Leave at a run's root what its steps leave there; returns the address of notify's own output."""
    if outcome:
        with working_for(str(root / "evaluate/execution/report")):
            write_outcome(outcome.result, outcome.sentence)
    if failed:
        write_failed_step(str(root / failed.step / "execution/report"), failed.sentence, failed.exit_code)
    return str(root / "notify/execution/summary")


PROMOTED = Outcome(result="promoted", sentence="version 3 of digits is champion: better by 0.1")
FAILED_GATE = Outcome(result="failed the gate", sentence="failed the gate: no better than the champion")
PASSED_GATE = Outcome(result="passed the gate", sentence="passed the gate: better by 0.1")
NOTHING_NEW = Outcome(result="nothing new", sentence="nothing new: version 3 of digits was tuned on this data")
MISTAKE = FailedStep(step="train", sentence="--lora_r: 0 is below 1; give 1 or more.", exit_code=2)


# The states are those that a Kubeflow server was recorded to send; the message of a failure is empty.
@pytest.mark.parametrize(
    ("state", "outcome", "failed", "text", "fields"),
    [
        ("COMPLETE", PROMOTED, None, f"succeeded, promoted: {PROMOTED.sentence}", ("SUCCEEDED", "promoted", "")),
        ("RUNNING", FAILED_GATE, None, f"succeeded, {FAILED_GATE.sentence}", ("SUCCEEDED", "failed the gate", "")),
        ("RUNNING", NOTHING_NEW, None, f"succeeded, {NOTHING_NEW.sentence}", ("SUCCEEDED", "nothing new", "")),
        (
            "FAILED",
            None,
            MISTAKE,
            "failed in train, --lora_r: 0 is below 1; give 1 or more",
            ("FAILED", "failed", "train"),
        ),
        ("FAILED", PROMOTED, MISTAKE, "failed in train, --lora_r: 0 is below 1", ("FAILED", "failed", "train")),
        ("FAILED", None, None, "failed, a step ended without a sentence", ("FAILED", "failed", "")),
        ("COMPLETE", None, None, "succeeded", ("SUCCEEDED", "", "")),
        # Cancelled while a step ran, also between evaluate and register.
        ("RUNNING", None, None, "stopped, the run was cancelled", ("STOPPED", "stopped", "")),
        ("RUNNING", PASSED_GATE, None, "stopped, the run was cancelled", ("STOPPED", "stopped", "")),
        ("SUCCEEDED", None, None, "succeeded", ("SUCCEEDED", "", "")),  # a run on this machine
        ("CANCELED", None, None, "canceled", ("CANCELED", "", "")),
    ],
)
def test_the_message_says_how_the_run_ended(
    tmp_path: Path,
    webhook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    outcome: Outcome | None,
    failed: FailedStep | None,
    text: str,
    fields: tuple[str, str, str],
) -> None:
    monkeypatch.setenv(environment.KFP_UI_ENDPOINT.name, "https://kubeflow.example/")
    end = describe_end("minicpmv-retrain", state, "", write_records(tmp_path / "run-7", outcome, failed))
    post(end)
    (message,) = webhook.received
    link = "https://kubeflow.example/#/runs/details/run-7"
    assert message["text"].startswith(f"minicpmv-retrain: {text}")
    assert message["text"].endswith(f" ({link})")
    assert (message["state"], message["result"], message["step"]) == fields
    assert message["link"] == link
    assert escape(end.outcome) in end.markdown()
    assert end.markdown().startswith(f"**{end.state.capitalize()}")


def test_the_outcome_is_posted_by_pipelines_of_0_1_0(webhook: Webhook) -> None:
    assert notify("minicpmv-retrain", "FAILED", "train failed")
    (message,) = webhook.received
    assert message["text"] == "minicpmv-retrain: failed, train failed (run run-7)"
    assert {key: message[key] for key in ("pipeline", "run", "state", "outcome")} == {
        "pipeline": "minicpmv-retrain",
        "run": "run-7",
        "state": "FAILED",
        "outcome": "train failed",
    }


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
