"""Packages of data, fetched by name with the registries' own clients, checked by their hash, and unpacked in a cache.

Nothing of a package is executed, except the one wheel that draws charts.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune.errors import RetryableError, UserError

CACHE = Path("build/public/packages")


@dataclass(frozen=True)
class Package:
    """A package in a registry.

    Attributes:
        registry: `Debian`, `PyPI` or `npm`.
        name: Name in the registry.
        license: License of its content, by its SPDX name.
        version: Version; empty takes the one that this release of Debian has.
        sha256: Accepted hashes of the file, one for each architecture; empty accepts what the client has checked.
    """

    registry: str
    name: str
    license: str
    version: str = ""
    sha256: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.registry, self.name, self.version)))


@dataclass(frozen=True)
class Fetched:
    """An unpacked package.

    Attributes:
        folder: Its files.
        file: Name of the file that the registry served, which contains the version.
        sha256: Hash of that file.
    """

    folder: Path
    file: str
    sha256: str


def fetch(package: Package) -> Fetched:
    """Download and unpack a package, unless it is in the cache.

    Raises:
        UserError: The registry's client is not installed, or the file is another than the one that is expected.
        RetryableError: The client failed.
    """
    place = CACHE / package.registry.lower() / "-".join(filter(None, (package.name, package.version)))
    content = place / "content"
    if not content.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        file = _download(package, place)
        _check(package, file)
        unfinished = place / "unfinished"
        _unpack(file, unfinished)
        unfinished.rename(content)
    file = next(path for path in place.iterdir() if path.is_file())
    return Fetched(content, file.name, _sha256(file))


def _download(package: Package, place: Path) -> Path:
    name, version = package.name, package.version
    commands: dict[str, Sequence[str]] = {
        "Debian": ("apt-get", "download", "-qq", f"{name}={version}" if version else name),
        "PyPI": (sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps",
                 "--only-binary=:all:", f"{name}=={version}"),
        "npm": ("npm", "pack", "--silent", f"{name}@{version}"),
    }  # fmt: skip
    command = commands[package.registry]
    if shutil.which(command[0]) is None:
        raise UserError(f"{package}: {command[0]} is not installed; install it, and repeat the command.")
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)  # noqa: S603
    files = [path for path in place.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        hint = " (the lists of packages come with `apt-get update`)" if package.registry == "Debian" else ""
        raise RetryableError(f"{package}: {command[0]} failed{hint}: {said[-1] if said else 'without a message'}")
    return files[0]


def _check(package: Package, file: Path) -> None:
    if package.sha256 and (found := _sha256(file)) not in package.sha256:
        file.unlink()
        raise UserError(f"{package}: {file.name} has the sha256 {found}, which is none of {', '.join(package.sha256)}.")


def _unpack(file: Path, folder: Path) -> None:
    folder.mkdir()
    if file.suffix == ".deb":
        subprocess.run(("dpkg-deb", "-x", file, folder), check=True)  # noqa: S603, S607
    elif file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(folder)  # noqa: S202
    else:
        with tarfile.open(file) as tar:
            tar.extractall(folder, filter="data")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
