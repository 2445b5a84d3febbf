"""The order of samples: random, or random with neighbors of similar lengths, for batches with little padding.

An order follows from a seed, the epoch and the lengths in the manifest, without reading a row, and is the same in every
process. It takes eight bytes a sample.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from minicpmv_finetune.shards.packing import one_by_one

_LENGTH_NOISE = 0.02
"""Standard deviation of the random factor on each length, by which the batches differ from epoch to epoch."""


class ShuffledSampler(Sampler[int]):
    """Random order, different in each epoch: that of torch's sampler with Accelerate's seed, which has it as a list."""

    def __init__(self, samples: int, seed: int) -> None:
        """Create the sampler for the first epoch.

        Args:
            samples: Number of samples.
            seed: Determines the order, together with the epoch.
        """
        self.samples = samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch; the Trainer calls this, also when it resumes from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return one_by_one(order.numpy())


class LengthGroupedSampler(Sampler[int]):
    """Random order in which neighbors have similar lengths; different in each epoch, the same in every process.

    Samples are sorted by length, after each length was multiplied by a random factor close to 1, so that a sample's
    neighbors change. Batches come in random order, except that one of the longest is first: if memory does not suffice,
    training fails at once. Padding of batches of 4, 8 and 32 from 120 photographs: 3, 6 and 18 %; when sorted within
    groups of a quarter of the samples, as transformers does, 9, 19 and 46 %. From 10,000 samples: 2, 3 and 5 % against
    4, 5 and 8 %.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Create the sampler for the first epoch.

        Args:
            lengths: Number of tokens of each sample.
            batch_size: Samples of one optimizer step: of all processes and accumulation steps together.
            seed: Determines the order, together with the epoch.
        """
        self.lengths = np.array(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch; the Trainer calls this, also when it resumes from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.argsort(-self.lengths * random.normal(1, _LENGTH_NOISE, len(self.lengths)))
        full = len(order) // self.batch_size * self.batch_size
        batches = order[:full].reshape(-1, self.batch_size)
        random.shuffle(batches[1:])  # a view: `order` changes with it
        return one_by_one(order)
