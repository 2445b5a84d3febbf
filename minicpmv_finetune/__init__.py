"""Fine-tune MiniCPM-V with LoRA: a Kubeflow pipeline that also runs whole on a laptop."""

import logging

from .moved_modules import follow_old_names

follow_old_names()
# On some CPUs bitsandbytes warns, in every process that imports peft, that a kernel is missing that nothing here uses:
# "Failed to load CPU gemm_4bit_forward …". This is the only thing that this logger reports.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
