"""A tokenized and sliced sample: what a shard stores and what batches are built from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss's default ignore_index


@dataclass(frozen=True)
class ModelInput:
    """One sample, ready for the model.

    Attributes:
        id: Identifier of the sample.
        input_ids: Token ids.
        labels: Ids of the supervised tokens, -100 at all other positions, not shifted; empty for a prompt.
        slices: Pixels of each slice, uint8 [height, width, 3], in the order of their tokens.
    """

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    slices: Sequence[NDArray[np.uint8]]
