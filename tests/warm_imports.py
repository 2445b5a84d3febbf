"""What the server of `warm_processes` imports before it forks."""

import gc
import os
import sys
from importlib import import_module
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
_modules: dict[str, Any] = sys.modules
_modules["bitsandbytes"] = None

os.environ["_KFP_RUNTIME"] = "true"  # by which KFP itself imports only what a step needs
import_module("kfp.dsl.executor_main")
del os.environ["_KFP_RUNTIME"]

from minicpmv_finetune.components.train.worker import import_deepspeed  # noqa: E402

import_deepspeed()
# With an optimizer that DeepSpeed imports late comes torch's compiler, a second of each process.
import_module("deepspeed.runtime.zero.muon.original_muon")

import_module("mlflow.store.tracking.sqlalchemy_store")

import minicpmv_finetune.components.merge.parity_check  # noqa: E402
import minicpmv_finetune.components.train.finetune  # noqa: E402, F401

# The programs of the processes run as `__main__`, and so are loaded again.
for _program in (
    "kfp.dsl.executor_main",
    "minicpmv_finetune.components.train.worker",
    "minicpmv_finetune.components.merge.parity_check",
):
    del sys.modules[_program]

# Otherwise each process's garbage collector would touch, and so copy, all memory that it shares with the server.
gc.collect()
gc.freeze()
