"""Check from inside a container that its image contains everything that the steps need; without network or GPU.

This module imports nothing heavy, so that a broken library is reported as a failed check.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version

from minicpmv_finetune import environment
from minicpmv_finetune.errors import UserError

from .checks import Check, SkippedError, run_check

_STEPS = "minicpmv_finetune.components"
_DATA_MODULES = ("numpy", "pyarrow", "boto3", "mlflow", "kfp.dsl", f"{_STEPS}.validate_data.validate")
_TRAINER_MODULES = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "deepspeed"),
    *(f"{_STEPS}.{step}" for step in ("preprocess.preprocess", "train.finetune", "merge.merge", "evaluate.evaluate")),
)


def check_container() -> list[Check]:
    """Check the container that this process runs in; an image with torch is the trainer's."""
    modules = list(_DATA_MODULES)
    is_trainer = importlib.util.find_spec("torch") is not None
    if is_trainer:
        modules += _TRAINER_MODULES
    checks = [
        run_check("Python", platform.python_version),
        run_check("package", version, "minicpmv-finetune"),
        run_check("user", _check_user),
        run_check("temporary folder", _check_temporary_folder),
        *(run_check(f"import {name}", _check_import, name) for name in modules),
    ]
    if is_trainer:
        checks += [run_check("compiler", _check_compiler), run_check("GPU", _check_gpu)]
    return checks


def _check_user() -> str:
    if os.getuid() == 0:
        raise UserError("root; run the container as the user for which its image was built.")
    return f"{os.getuid()}:{os.getgid()}"


def _check_temporary_folder() -> str:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); mount a volume and set TMPDIR.") from error
    return tempfile.gettempdir()


def _check_import(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        # Whatever breaks an import, the image is not fit for use.
        raise UserError(f"{type(error).__name__}: {error!s:.200}; build the container image again.") from error
    return str(getattr(module, "__version__", "available"))


def _check_compiler() -> str:
    path = shutil.which(environment.C_COMPILER.read())
    if not path:
        raise UserError("not found, but DeepSpeed, Triton and inductor compile at run time; install gcc.")
    return path


def _check_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SkippedError(f"none here; built for CUDA {torch.version.cuda}, Python {sys.version_info.major}")
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
