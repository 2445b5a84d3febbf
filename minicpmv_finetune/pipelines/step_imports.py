"""What every step of a run on this machine imports, and the settings for it (see `step_servers`)."""

import os
import sys
from importlib import import_module
from typing import Any

from minicpmv_finetune.cores import share_cores
from minicpmv_finetune.progress import quieten_libraries
from minicpmv_finetune.tracking.step_runs import import_mlflow

quieten_libraries()
share_cores()
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["_KFP_RUNTIME"] = "true"  # by which KFP itself imports only what a step needs
_modules: dict[str, Any] = sys.modules
_modules |= {"bitsandbytes": None, "deepspeed": None}  # as in trainings that need neither, see `train.worker`

import_module("kfp.dsl.executor_main")
import_mlflow(with_database=True)
