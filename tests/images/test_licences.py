"""Every package that the images install may be handed on: permissive, or one of the few named here."""

import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

import pytest

LOCK = Path(__file__).parents[2] / "requirements.lock"
LOCKED = re.findall(r"^([a-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)
PERMISSIVE = re.compile(r"(?i)\b(mit|apache|bsd|0bsd|isc|psf|python software foundation|mpl|mozilla|zlib)\b|mit-")
# Reason: each is used as it is published and linked dynamically; NVIDIA's may be passed on within an application.
NAMED = {
    "psycopg2-binary": "LGPL with exceptions",
    "cuda-toolkit": "NVIDIA; an empty package that names others",
    "huey": "MIT, as its LICENSE says; of MLflow",
    "skops": "MIT, as its repository says; of MLflow",
}


def _licence(about: PackageMetadata) -> str:
    classifiers = [line for line in about.get_all("Classifier", []) if line.startswith("License")]
    return " ".join([about.get("License-Expression") or "", *classifiers, (about.get("License") or "")[:200]])


@pytest.mark.parametrize("package", LOCKED)
def test_licence_lets_the_images_be_handed_on(package: str) -> None:
    try:
        licence = _licence(metadata(package))
    except PackageNotFoundError:
        pytest.skip("not for this platform")
    if package not in NAMED and "nvidia" not in package:
        assert PERMISSIVE.search(licence), licence
        assert not re.search(r"\bA?GPL", licence.replace("LGPL", "")), licence
