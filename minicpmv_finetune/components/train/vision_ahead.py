"""The frozen vision modules of the next batch, which run while the language model computes this one, on a CPU.

When two threads divide each operation, they wait for each other thousands of times in a step, and many operations are
too small to be divided. When each has work of its own, they wait once in a step. So half of torch's threads, the
helpers, compute the next batch's slices in parts, and the other half trains. When the batch is needed, the training
itself computes the parts that no helper has begun. With two cores the first epoch of `benchmarks/peers.py` takes 10.8,
10.9 and 10.9 s instead of 12.9, 12.9 and 12.5 s, alternating.

Where vision takes fewer operations than language, helpers would wait, and of a few slices the training would wait for
the last part; the model computes such batches as without helpers. The features differ by rounding from those of the
whole batch in one pass. They are the same in each run, whoever computes a part of them, because each part is computed
with one thread.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from minicpmv_finetune.estimate.cost import Model
from minicpmv_finetune.estimate.efficiency import Work, needed_flops
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

from .feature_store import divide

_PARTS = "vision_parts"  # key of a batch whose slices are being computed
_PART_PATCHES = 2**12
"""Patches of a part at least, except the last one: four slices of 448 × 448. Parts of two take 3 % longer."""

_PARTS_PER_THREAD = 2
"""How many parts of a batch each thread has at least, so that none waits long for the last one."""

_WORTH_HELPERS = 1e9
"""Operations of a batch's vision, about 10 ms, below which helpers would gain nothing."""

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def favors_helpers(sizes: Model, trained: Mapping[str, int], batch: Mapping[str, Any]) -> bool:
    """Whether a batch's vision takes as many operations as its language, and enough to be computed beside another one.

    Args:
        sizes: The model's numbers of parameters.
        trained: Number of trained parameters of each part; the tower has none.
        batch: The model's arguments. The merger is counted as vision.
    """
    patches = batch["target_sizes"].prod(1).double()
    seen = Work(0, 0, 0, float(patches.sum()), float(patches.square().sum()), runs_tower=True)
    supervised = float((batch["labels"] != IGNORED_LABEL).sum())
    read = Work(batch["input_ids"].numel(), 0, supervised, 0, 0, runs_tower=False)
    vision, language = (needed_flops(sizes, trained, work) for work in (seen, read))
    return vision >= max(language, _WORTH_HELPERS)


class VisionAhead:
    """Runs the vision modules of the batches that are read from a loader, one batch ahead."""

    def __init__(self, compute: Compute, argument: str, favors_helpers: Callable[[Mapping[str, Any]], bool]) -> None:
        """Start no thread yet.

        Args:
            compute: Computes the features of slices, from `pixel_values` and `target_sizes` of a batch.
            argument: The model's argument for such features.
            favors_helpers: Whether a batch's vision is computed ahead, if it has enough parts.
        """
        self._compute = compute
        self._argument = argument
        self._favors_helpers = favors_helpers
        self._threads = torch.get_num_threads()
        self._helpers = self._threads // 2
        self._pool = ThreadPoolExecutor(self._helpers, "vision", initializer=_use_one_thread)
        self._source: Iterator[Any] | None = None
        self._next: Any = None
        self._begun: list[MutableMapping[str, Any]] = []  # batches whose features are not put in place yet

    def read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Read batches; when one is returned, the vision of the next one has been begun.

        Args:
            batches: An epoch's batches; may be given again to read more of them.
        """
        if self._source is not batches or self._next is None:
            self._source, self._next = batches, next(batches, None)
            self._begin(self._next)
        while self._next is not None:
            batch, self._next = self._next, next(batches, None)
            self._begin(self._next)
            yield batch

    def finish(self, batch: MutableMapping[str, Any]) -> None:
        """Put the features of a batch in place of its pixels; then torch computes with the threads that do not help."""
        self._collect(batch)
        torch.set_num_threads(self._threads - self._helpers if self._begun else self._threads)

    def pause(self) -> None:
        """Compute what has been begun, and let torch compute with all threads."""
        for batch in [*self._begun]:
            self._collect(batch)
        torch.set_num_threads(self._threads)

    def close(self) -> None:
        """Forget all batches, compute none of them further, and let torch compute with all threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source, self._next, self._begun = None, None, []
        torch.set_num_threads(self._threads)

    def _begin(self, batch: Any) -> None:
        """Let the helpers compute a batch's slices, if it has enough of them."""
        if batch is None or "pixel_values" not in batch or not self._favors_helpers(batch):
            return
        parts = _divide(batch["pixel_values"], batch["target_sizes"])
        if len(parts) >= _PARTS_PER_THREAD * self._threads:
            batch[_PARTS] = [(self._pool.submit(self._compute, *part), *part) for part in parts]
            self._begun.append(batch)

    def _collect(self, batch: MutableMapping[str, Any]) -> None:
        """Put the features of a batch in place of its pixels, if they were begun."""
        if (parts := batch.pop(_PARTS, None)) is None:
            return
        self._begun = [begun for begun in self._begun if begun is not batch]
        torch.set_num_threads(1)
        # The helpers begin with the first parts. What they have not begun is computed here.
        features = [
            self._compute(pixels, sizes) if future.cancel() else future.result()
            for future, pixels, sizes in reversed(parts)
        ]
        batch[self._argument] = torch.cat(features[::-1])
        del batch["pixel_values"]


def _divide(pixels: torch.Tensor, sizes: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Divide slices into parts of neighbors with `_PART_PATCHES` patches at least, except the last one."""
    patch_size, places = pixels.shape[2], np.cumsum([0, *sizes.prod(1).tolist()])
    parts = []
    for part in divide(range(len(sizes)), places, _PART_PATCHES):
        columns = slice(places[part.start] * patch_size, places[part.stop] * patch_size)
        parts.append((pixels[..., columns], sizes[part.start : part.stop]))
    return parts


def _use_one_thread() -> None:
    """Let torch compute with one thread in this one."""
    torch.get_num_threads()  # in a new thread, torch's first operation would take over the number of another one
    torch.set_num_threads(1)
