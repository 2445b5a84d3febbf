"""What the launcher starts in each training process.

torchrun restarts every process that failed. If the predecessor ended for a known reason, this one ends before it
imports torch and transformers, which takes seconds.

PEFT imports bitsandbytes wherever that is installed, and with it torch's compiler: a sixth of the time until a process
is ready (2 of 13 seconds on a CPU). Only QLoRA, a few optimizers and quantized checkpoints use it.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .flags import read_flags
from .worker_exit import record_crash, repeat_exit


def leave_out_bitsandbytes(flags: Sequence[str]) -> None:
    """Let libraries believe that bitsandbytes is not installed, if a training with these flags does not need it."""
    _, values, _ = read_flags(flags)
    is_needed = values.get("q_lora") or any(name in str(values.get("optim")) for name in ("8bit", "bnb", "paged"))
    if not is_needed and _is_plain_checkpoint(values.get("model_name_or_path")):
        modules: dict[str, Any] = sys.modules
        modules["bitsandbytes"] = None


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
    leave_out_bitsandbytes(sys.argv[1:])
    try:
        from .finetune import main
    except Exception as error:
        record_crash(error)  # a library that is missing or broken stays so
        raise

    main(sys.argv[1:])
