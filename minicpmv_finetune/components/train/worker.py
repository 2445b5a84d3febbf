"""What the launcher starts in each training process.

torchrun restarts every process that failed. If the predecessor ended for a known reason, this one ends before it
imports torch and transformers, which takes seconds.

Accelerate imports DeepSpeed wherever that is installed, and with it MLflow; PEFT imports bitsandbytes, and with it
torch's compiler. Together they would take a third of the time until a process is ready (7 of 20 seconds on a CPU). Few
trainings use them.
"""

import importlib
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpmv_finetune import environment

from .flags import read_flags
from .worker_exit import record_crash, repeat_exit


def leave_out_unused(flags: Sequence[str]) -> None:
    """Let libraries believe that bitsandbytes and DeepSpeed are not installed, if a training does not need them."""
    _, values, _ = read_flags(flags)
    modules: dict[str, Any] = sys.modules
    if not needs_bitsandbytes(values):
        modules["bitsandbytes"] = None
    if not needs_deepspeed(values):
        modules["deepspeed"] = None


def import_deepspeed() -> None:
    """Import DeepSpeed without what a training does not use.

    MLflow serves only its autotuner; a training's own MLflow is imported later. On a CPU it would compile a collective
    for shared memory, which takes minutes of two cores in each new container; torch's own collectives do as well.
    """
    modules: dict[str, Any] = sys.modules
    modules["mlflow"] = None
    try:
        operations = importlib.import_module("deepspeed.ops")
    finally:
        del modules["mlflow"]
    operations.__compatible_ops__["deepspeed_shm_comm"] = False


def needs_bitsandbytes(values: Mapping[str, Any]) -> bool:
    """Whether a training with these values of flags uses bitsandbytes, or a base model that is not here yet may."""
    is_used = values.get("q_lora") or any(name in str(values.get("optim")) for name in ("8bit", "bnb", "paged"))
    return bool(is_used) or not _is_plain_checkpoint(values.get("model_name_or_path"))


def needs_deepspeed(values: Mapping[str, Any]) -> bool:
    """Whether a training with these values of flags uses DeepSpeed."""
    is_partitioned = values.get("strategy") in ("zero2", "zero3") and not values.get("fsdp")
    # Accelerate's own variable, which no flag replaces.
    is_asked_for = environment.ACCELERATE_USE_DEEPSPEED.read().lower() == "true"
    return bool(is_partitioned or values.get("deepspeed") or values.get("parallelism_config") or is_asked_for)


def _is_plain_checkpoint(base: str | None) -> bool:
    """Whether a base model is a folder of this machine whose weights are not quantized."""
    try:
        return base is not None and '"quantization_config"' not in (Path(base) / "config.json").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    # Until the training handles it, Ctrl-C ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    repeat_exit()
    leave_out_unused(sys.argv[1:])
    try:
        if "deepspeed" not in sys.modules:  # where it is left out, its name is there
            import_deepspeed()
        from .finetune import main
    except Exception as error:
        record_crash(error)  # a library that is missing or broken stays so
        raise

    main(sys.argv[1:])
