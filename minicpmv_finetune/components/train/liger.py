"""liger-kernel's norms, rotary positions and gated feed-forward layers for the language model, on a GPU.

transformers' own `--use_liger_kernel` looks the whole model's type up among those liger knows, finds no MiniCPM-V, and
goes on without a word. The language model inside is one that liger knows (Qwen 2, Qwen 3, Qwen 3.5), so it is handed
over by itself. Its loss is not taken: logits are computed where something is learnt alone (`minicpmv/loss.py`).
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from minicpmv_finetune.errors import UserError


def use_liger(language_model: nn.Module) -> None:
    """Exchange what liger has kernels for.

    Args:
        language_model: the part of the model that has decoder layers; changed in place, before adapters are put on it.

    Raises:
        UserError: there is no GPU, the package is not installed, or it does not know this language model.
    """
    if not torch.cuda.is_available():
        raise UserError("--use_liger_kernel: its kernels run on a GPU, and there is none here; leave the flag out.")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel: liger-kernel is not installed here; pip install liger-kernel.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    config: Any = language_model.config
    kind = config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--use_liger_kernel: liger-kernel does not know language models of type {kind}; leave it out.")
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](model=language_model, cross_entropy=False, fused_linear_cross_entropy=False)
