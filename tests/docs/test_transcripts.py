"""The transcripts in the documentation are what the commands print, run against a server that keeps state."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicpmv_finetune.cli import main
from tests.cluster.fake_kubeflow import FakeKubeflow, serving
from tests.docs.pages import ROOT, blocks, name_of

pytestmark = pytest.mark.docs_only

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```console" in page.read_text()]
# What differs from run to run, and what stands for it.
VARIABLE = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "ID"),
    (r"http://(localhost|127\.0\.0\.1):\d+", "SERVER"),
    (r"version [0-9a-f]{12}", "version DIGEST"),
    (r"minicpmv-finetune-\d{8}-\d{6}", "minicpmv-finetune-TIME"),
    (r"[ \t]+", " "),
    (r"(SUCCEEDED 1) \d+", r"\1 SECONDS"),
)


def steps_of(page: Path) -> Iterator[tuple[str, str]]:
    """Yield each command of a page's console blocks with the output that is shown."""
    for block in blocks(page.read_text()):
        if block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                yield command, output


def normalized(text: str) -> str:
    for pattern, name in VARIABLE:
        text = re.sub(pattern, name, text)
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MINICPMV_FINETUNE_PROFILE", "k8s/profiles/dev.yaml")
    monkeypatch.delenv("KF_PIPELINES_TOKEN", raising=False)
    with serving(FakeKubeflow()) as fake:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.url)
        for command, shown in steps_of(page):
            words = shlex.split(command)
            if words[0] != "minicpmv-finetune":
                assert words[0] == "export"
                continue
            # The base models of the transcripts are on a volume of the cluster, so no hub is asked.
            polling = ["--poll", "0"] if "--wait" in words else []
            monkeypatch.setattr(sys, "argv", [*words, *polling])
            code: object = None
            try:
                main.main()
            except SystemExit as ended:
                code = ended.code
            assert not code, capsys.readouterr().err
            assert normalized(capsys.readouterr().out) == normalized(shown), command
