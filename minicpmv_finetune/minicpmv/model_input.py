"""What a sample has become once it is tokenized and sliced: the row that shards store and batches are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss's default ignore_index


@dataclass(frozen=True)
class ModelInput:
    """One sample, ready for the model.

    Attributes:
        id: of the sample.
        input_ids: token ids.
        labels: the supervised ids, -100 elsewhere, not shifted; empty for a prompt.
        slices: uint8 [height, width, 3] each, in the order in which their tokens stand.
    """

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    slices: Sequence[NDArray[np.uint8]]
