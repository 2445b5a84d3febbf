"""Token accuracy for evaluations during training: the share of supervised tokens that the model predicts correctly."""

from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL


def count_right(predicted: Any, labels: torch.Tensor) -> torch.Tensor:
    """Count predictions, so that the evaluation keeps two numbers of a sample, whatever its length.

    Args:
        predicted: Logits of each position, or its most likely token; may be the first of a tuple.
        labels: Labels, [samples, positions].

    Returns:
        Number of supervised tokens that are predicted correctly, and of all, [samples, 2].
    """
    tokens: torch.Tensor = predicted[0] if isinstance(predicted, tuple) else predicted
    if tokens.is_floating_point():
        tokens = tokens.argmax(dim=-1)
    supervised = labels[:, 1:] != IGNORED_LABEL
    right = supervised & (tokens[:, :-1] == labels[:, 1:])
    return torch.stack([right.sum(1), supervised.sum(1)], dim=1)


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metric from the counts of an evaluation's samples, which may be an array for each batch."""
    right, supervised = np.vstack(list(prediction.predictions)).sum(axis=0)
    return {"token_accuracy": float(right / supervised)}
