"""The commit that a training records is that of the running code, or it is unknown."""

import subprocess
from pathlib import Path

import pytest

from minicpmv_finetune.environment import GIT_COMMIT
from minicpmv_finetune.git_commit import commit_of_checkout, git_commit


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a git checkout, not committed yet."""
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    _git(package.parent, "init", "--quiet")
    return package


def test_the_variable_of_the_container_image_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GIT_COMMIT.name, "1234abcd")
    assert git_commit() == "1234abcd"
    dockerfile = Path(__file__).parents[1] / "images" / "Dockerfile"
    assert f"    {GIT_COMMIT.name}=${{REVISION}} \\\n" in dockerfile.read_text()


def test_a_checkout_reports_its_commit(package: Path) -> None:
    _git(package, "add", ".")
    _git(package, "commit", "--quiet", "--message", "first")
    commit = commit_of_checkout(package)
    assert commit == _git(package, "rev-parse", "HEAD")
    assert len(commit) == 40


def test_another_projects_commit_is_not_reported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _git(package, "add", ".")
    _git(package, "commit", "--quiet", "--message", "first")
    installed = package.parent / "environment" / "site-packages" / "other"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commit_of_checkout(installed) == ""
    # As in a git hook of the other project.
    monkeypatch.setenv("GIT_DIR", str(package.parent / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(installed.parent))
    assert commit_of_checkout(installed) == ""


def test_no_checkout_no_commit_and_no_git_are_unknown(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert commit_of_checkout(tmp_path) == ""
    _git(package, "add", ".")
    assert commit_of_checkout(package) == "", "nothing is committed"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of_checkout(package) == ""
    monkeypatch.delenv(GIT_COMMIT.name, raising=False)
    assert git_commit() == "unknown"
    assert capfd.readouterr() == ("", "")
