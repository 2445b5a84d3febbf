"""What the tests of cluster commands share: inputs, and the type of a function that calls the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE_MODEL = "openbmb/MiniCPM-V-4.6@0123456789abcdef0123456789abcdef01234567"
INPUTS = ["-p", "data_uri=s3://bucket/train.json", "-p", f"base_model_uri={BASE_MODEL}"]


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Answer]
