"""The token accuracy of an evaluation, of which two numbers a sample are kept."""

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from minicpmv_finetune.components.train.token_accuracy import count_right, token_accuracy


def test_supervised_tokens_are_counted_by_sample_whatever_the_length_of_a_batch() -> None:
    short = count_right(torch.tensor([[7, 8, 0]]), torch.tensor([[-100, 7, 9]]))
    assert short.tolist() == [[1, 2]]
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    logits = torch.nn.functional.one_hot(tokens, 10).float()
    labels = torch.tensor([[-100, -100, 2, 3], [-100, 5, -100, 9]])
    long = count_right((logits,), labels)
    assert long.tolist() == [[2, 2], [1, 2]]
    counts = np.concatenate([short.numpy(), long.numpy()])
    assert token_accuracy(EvalPrediction(counts, counts)) == {"token_accuracy": 4 / 6}
    by_batch = [short.numpy(), long.numpy()]  # with --eval_do_concat_batches false
    assert token_accuracy(EvalPrediction(by_batch, by_batch)) == {"token_accuracy": 4 / 6}  # type: ignore[arg-type]
