"""Token accuracy for evaluations during training: the share of supervised tokens that the model predicts correctly."""

from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL


def predicted_tokens(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduce the logits of each position to its most likely token; the evaluation keeps nothing else of them."""
    predicted: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return predicted.argmax(dim=-1) if predicted.is_floating_point() else predicted


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metric from the predicted tokens and the labels of an evaluation."""
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    supervised = labels != IGNORED_LABEL
    return {"token_accuracy": float((predicted == labels)[supervised].mean())}
