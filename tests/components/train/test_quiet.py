"""What a training says with --quiet."""

import pytest

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.finetune import _log, _warn


@pytest.mark.parametrize(("quiet", "shown"), [("", "a remark\na warning\n"), ("1", "a warning\n")])
def test_quiet_leaves_out_remarks_and_no_warning(
    quiet: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(environment.RANK.name, "0")
    monkeypatch.setenv(environment.QUIET.name, quiet)
    _log("a remark")
    _warn("a warning")
    assert capsys.readouterr().err == shown
