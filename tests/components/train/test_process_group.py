"""A process that fails leaves at once with its code; only a successful one closes the process group."""

from typing import Any

import pytest
import torch

from minicpmv_finetune.components.train import finetune
from minicpmv_finetune.errors import RetryableError, UserError

FLAGS = ["--data_path", "data", "--output_dir", "out"]


class _Left(BaseException):
    pass


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def leave(code: int) -> None:
        found.append(code)
        raise _Left

    monkeypatch.setattr(finetune.os, "_exit", leave)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: found.append("closed"))
    monkeypatch.delenv("MINICPMV_FINETUNE_WORKER_EXIT_FOLDER", raising=False)
    return found


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a"), 2), (RetryableError("b"), 75), (RuntimeError("c"), 1), (KeyError("d"), 1)]
)
def test_a_failed_process_leaves_at_once(
    error: Exception,
    code: int,
    events: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(finetune, "finetune", fail)
    with pytest.raises(_Left):
        finetune.main(FLAGS)
    assert events == [code]
    assert str(error) in capsys.readouterr().err


def test_a_successful_process_closes_the_group(events: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "finetune", lambda *arguments: None)
    finetune.main(FLAGS)
    assert events == ["closed"]
