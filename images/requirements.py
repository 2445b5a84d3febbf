"""Print the packages that a container image installs: those of requirements.lock that the project needs in it.

    python images/requirements.py data > build/images/data.txt

To the trainer's, those of images/gpu.lock are added: kernels that only a GPU can run, which no developer needs.

The lock file also contains the developers' tools. Which packages a package requires is read from the packages in this
environment, which was installed from the same lock file.
"""

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TRAINER_ONLY = {"accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "torchvision"}
"""Packages that need torch, and with it CUDA: checking data, tracking and calling Kubeflow work without them."""


def required_packages(image: str) -> set[str]:
    """Names of the packages that the project requires in a container image, directly or indirectly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if (image == "data" and name in TRAINER_ONLY) or (name, frozenset(requirement.extras)) in seen:
            continue
        found.add(name)
        seen.add((name, frozenset(requirement.extras)))
        for line in requires(name) or []:
            dependency = Requirement(line)
            extras = requirement.extras or {""}
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(dependency)
    return found


def select_entries(lock: str, names: set[str]) -> str:
    """The entries of these packages in the lock file; some packages have an entry for each of several Python versions.

    Raises:
        KeyError: A package is not in the lock file.
    """
    entries: dict[str, str] = {}
    for entry in re.finditer(r"(?m)^(\S+?)==(?:.*\\\n)*.*\n", lock):
        name = canonicalize_name(entry[1])
        entries[name] = entries.get(name, "") + entry[0]
    return "".join(entries[name] for name in sorted(names))


def list_packages(image: str) -> str:
    """The entries of all packages of a container image, with their hashes."""
    entries = select_entries((ROOT / "requirements.lock").read_text(), required_packages(image))
    return entries + ((ROOT / "images" / "gpu.lock").read_text() if image == "trainer" else "")


if __name__ == "__main__":
    print(list_packages(sys.argv[1]), end="")
