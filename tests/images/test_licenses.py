"""Every package that the container images install may be redistributed: by its license, or by an entry in NAMED."""

import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

import pytest

LOCK = Path(__file__).parents[2] / "requirements.lock"
LOCKED = re.findall(r"^([a-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)
PERMISSIVE = re.compile(r"(?i)\b(mit|apache|bsd|0bsd|isc|psf|python software foundation|mpl|mozilla|zlib)\b|mit-")
# Reason: each is used unchanged and linked dynamically; NVIDIA's packages may be redistributed within an application.
NAMED = {
    "psycopg2-binary": "LGPL with exceptions",
    "cuda-toolkit": "NVIDIA; an empty package that requires others",
    "huey": "MIT, by its LICENSE file; a dependency of MLflow",
    "skops": "MIT, by its repository; a dependency of MLflow",
}


def _license(package: PackageMetadata) -> str:
    classifiers = [line for line in package.get_all("Classifier", []) if line.startswith("License")]
    expression, text = (package.get_all(field, [""])[0] for field in ("License-Expression", "License"))
    return " ".join([expression, *classifiers, text[:200]])


@pytest.mark.parametrize("package", LOCKED)
def test_a_package_may_be_redistributed(package: str) -> None:
    try:
        license = _license(metadata(package))
    except PackageNotFoundError:
        pytest.skip("not for this platform")
    if package not in NAMED and "nvidia" not in package:
        assert PERMISSIVE.search(license), license
        assert not re.search(r"\bA?GPL", license.replace("LGPL", "")), license
