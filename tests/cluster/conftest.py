import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpmv_finetune.cli import main
from tests.cluster.commands import ROOT, Answer, Command
from tests.cluster.fake_kubeflow import FakeKubeflow, serving


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKubeflow]:
    """A server of its own, which the environment leads to."""
    with serving(FakeKubeflow()) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        monkeypatch.delenv("KF_PIPELINES_TOKEN", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield fake


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line here, against the development profile."""
    monkeypatch.setenv("MINICPMV_FINETUNE_PROFILE", str(ROOT / "k8s" / "profiles" / "dev.yaml"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["minicpmv-finetune", *map(str, words)])
        code = 0
        try:
            main.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., Path]:
    """The development profile with some of it changed."""

    def write(**change: Any) -> Path:
        said = yaml.safe_load((ROOT / "k8s" / "profiles" / "dev.yaml").read_text())
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({**said, **change}))
        return path

    return write
