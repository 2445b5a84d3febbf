"""Write what an image installs: the packages of requirements.lock that the project needs there, with their hashes.

    python images/requirements.py data > build/images/data.txt

The lock holds the developers' tools too. What a package needs is read from what is installed here, from that same lock.
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
"""What needs torch, and with it CUDA: checking data, tracking and talking to Kubeflow do without."""


def needed(image: str) -> set[str]:
    """Names of the packages that the project needs in an image, those that they need included."""
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
            below = Requirement(line)
            extras = requirement.extras or {""}
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(below)
    return found


def locked(lock: str, names: set[str]) -> str:
    """The lock's entries of these packages; some have one for each of several versions of Python.

    Raises:
        KeyError: the lock lacks one of them.
    """
    entries: dict[str, str] = {}
    for entry in re.finditer(r"(?m)^(\S+?)==(?:.*\\\n)*.*\n", lock):
        name = canonicalize_name(entry[1])
        entries[name] = entries.get(name, "") + entry[0]
    return "".join(entries[name] for name in sorted(names))


if __name__ == "__main__":
    print(locked((ROOT / "requirements.lock").read_text(), needed(sys.argv[1])), end="")
