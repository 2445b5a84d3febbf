"""liger-kernel's norms, rotary positions and gated feed-forward layers for the language model, on a GPU.

transformers' own `--use_liger_kernel` searches the whole model's type among those that liger supports, does not find
MiniCPM-V, and continues without a warning. liger supports the language model inside (Qwen 2, Qwen 3, Qwen 3.5), so this
module applies liger to that part. liger's loss is not used: logits are computed only for supervised tokens
(`minicpmv/loss.py`).
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from minicpmv_finetune.errors import UserError

from .flags import LIGER_WITHOUT_GPU


def use_liger(language_model: nn.Module) -> None:
    """Replace the layers for which liger has kernels.

    Args:
        language_model: Part of the model that contains the decoder layers; changed in place, before it gets adapters.

    Raises:
        UserError: There is no GPU, the package is not installed, or it does not support this language model.
    """
    if not torch.cuda.is_available():
        raise UserError(LIGER_WITHOUT_GPU)
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--use_liger_kernel: liger-kernel is not installed; pip install liger-kernel.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    config: Any = language_model.config
    model_type = config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"--use_liger_kernel: liger-kernel does not support language models of type {model_type}; leave the flag "
            "out."
        )
    MODEL_TYPE_TO_APPLY_LIGER_FN[model_type](
        model=language_model, cross_entropy=False, fused_linear_cross_entropy=False
    )
