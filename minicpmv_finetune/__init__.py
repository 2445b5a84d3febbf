"""Fine-tune MiniCPM-V with LoRA: a Kubeflow pipeline that also runs whole on a laptop."""

import logging
from typing import TYPE_CHECKING, Any

from .moved_modules import follow_old_names

if TYPE_CHECKING:
    from .serving.asking import answer, load

__all__ = ["answer", "load"]

follow_old_names()
# On some CPUs bitsandbytes warns, in every process that imports peft, that a kernel is missing that nothing here uses:
# "Failed to load CPU gemm_4bit_forward …". This is the only thing that this logger reports.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import `load` and `answer` when they are first used, because they need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .serving import asking

    return getattr(asking, name)
