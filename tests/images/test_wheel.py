"""The wheel that is installed into the container images: every package and data file, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "minicpmv_finetune"
DATA_SUFFIXES = {".html", ".css", ".js", ".json", ".md", ".yaml"}
NOT_SOURCE = ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "golden", "published")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make images` builds it, from a copy of the sources and by the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCE)
    offline = ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *offline, "--wheel-dir", str(folder), "."]
    subprocess.run(command, cwd=folder / "source", check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_contains_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and (path.suffix == ".py" or path.suffix in DATA_SUFFIXES)
        # The compiled pipelines are for readers of the repository.
        if path.parent.name != "compiled"
    }
    contained = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert contained == expected
    for name in (
        "minicpmv_finetune/components/train/README.md",
        "minicpmv_finetune/components/train/strategies/zero3.json",
        "minicpmv_finetune/kubeflow/profiles/kubeflow.yaml",
        "minicpmv_finetune/pipelines/finetuning.py",
        "minicpmv_finetune/reports/pages.css",
    ):
        assert name in contained


def test_the_installed_wheel_runs_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(place), str(wheel)], check=True)
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(place)!r})\n"
        "import minicpmv_finetune\n"
        f"assert minicpmv_finetune.__file__.startswith({str(place)!r}), minicpmv_finetune.__file__\n"
        "from minicpmv_finetune.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "compile", str(tmp_path / "pipeline.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pipeline.yaml").stat().st_size > 0
