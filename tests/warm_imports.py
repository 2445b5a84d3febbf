"""What the server of `warm_processes` imports before it forks."""

import os
import sys
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
_modules: dict[str, Any] = sys.modules
_modules["bitsandbytes"] = None

from minicpmv_finetune.components.train.worker import import_deepspeed  # noqa: E402

import_deepspeed()

import minicpmv_finetune.components.merge.parity_check  # noqa: E402
import minicpmv_finetune.components.train.finetune  # noqa: E402, F401

# The programs of the processes run as `__main__`, and so are loaded again.
for _program in ("minicpmv_finetune.components.train.worker", "minicpmv_finetune.components.merge.parity_check"):
    del sys.modules[_program]
