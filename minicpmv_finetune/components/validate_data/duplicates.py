"""Find images that occur more than once: the same bytes at several addresses, or a copy that looks the same."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from minicpmv_finetune.data.samples import Split

from .inventory import Inventory, in_order, marked
from .near_equal import find_near_equal

_LISTED_GROUPS = 10_000
_LISTED_ROWS = 10


class Appearance(BaseModel):
    """An address at which a repeated image occurs."""

    model_config = ConfigDict(frozen=True)

    uri: str
    split: Split
    sample: str = Field(description="Id of the first sample that shows the image.")


class Repetition(BaseModel):
    """A line of `duplicates.jsonl`: an image that occurs more than once."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["equal", "near"]
    leaks: bool = Field(description="Whether the image is in both training and evaluation data.")
    count: int = Field(description="Number of addresses, each counted once for each split.")
    appearances: tuple[Appearance, ...] = Field(description="The first addresses.")


@dataclass(frozen=True)
class Group:
    """Images that are equal or near-equal.

    Attributes:
        kind: Whether the images are equal or near-equal.
        leaks: Whether the images are in both training and evaluation data.
        count: Number of addresses, each counted once for each split.
        rows: The first images of each split, as rows of `Inventory.image_rows`.
    """

    kind: Literal["equal", "near"]
    leaks: bool
    count: int
    rows: tuple[int, ...]


def find_repeated(inventory: Inventory, is_eval: NDArray[np.bool_]) -> tuple[list[Group], Counter[str]]:
    """Find images that occur more than once.

    Args:
        inventory: The accepted samples.
        is_eval: Whether each sample is for evaluation.

    Returns:
        The first groups, those that leak from training to evaluation before the others; and counts by code:
        `equal_pictures` and `near_equal_pictures` (images that have a copy), `partly_compared` (images that
        were compared with some of those only that resemble them), `leaked_equal` and `leaked_near` (evaluation samples
        with an image that is in the training data too), `duplicate_samples` (samples equal to an earlier one of their
        split).
    """
    rows = inventory.image_rows()
    first, image = inventory.distinct_images
    in_eval = is_eval[rows["sample"]]
    in_train_data, in_eval_data = (marked(image[side], len(first)) for side in (~in_eval, in_eval))
    near = find_near_equal(inventory, first, in_train_data, in_eval_data)
    differs = (rows["address"] != rows["address"][first[image]]) | (in_eval != in_eval[first[image]])
    is_repeated = marked(image[differs], len(first))
    equal_groups = _Groups("equal", image, rows["address"], in_eval, np.flatnonzero(is_repeated[image]))
    near_groups = _Groups("near", near.group[image], rows["address"], in_eval, np.flatnonzero(near.has_copy[image]))
    counts: Counter[str] = Counter()
    leaked = np.unique(rows["sample"][in_eval & in_train_data[image]])
    near_leaked = np.unique(rows["sample"][in_eval & near.leaks[image]])
    counts["leaked_equal"] = len(leaked)
    counts["leaked_near"] = len(np.setdiff1d(near_leaked, leaked))
    counts["equal_pictures"] = len(equal_groups)
    counts["near_equal_pictures"] = int(near.has_copy.sum())
    counts["partly_compared"] = int(near.is_partial.sum())
    digests = inventory.digests()
    for numbers in in_order(digests):
        for side in (False, True):
            ordered = digests[numbers[is_eval[numbers] == side]]
            counts["duplicate_samples"] += int((ordered[1:] == ordered[:-1]).all(axis=1).sum())
    return _first_groups([equal_groups, near_groups]), counts


class _Groups:
    """Groups of equal images or of images that look the same, with more than one address or split.

    Where many images are repeated they are many, so they are parts of an array until one is asked for.

    Attributes:
        is_within_one_split: Whether each group is in one split only.
        first_row: The first row of each group, one of the training data if there is one.
    """

    def __init__(
        self,
        kind: Literal["equal", "near"],
        group: NDArray[np.int32],
        address: NDArray[np.uint64],
        in_eval: NDArray[np.bool_],
        rows: NDArray[np.intp],
    ) -> None:
        """Find the groups.

        Args:
            kind: Kind of the groups.
            group: Number of the group of each row.
            address: Address of each row's image.
            in_eval: Whether each row is in the evaluation data.
            rows: The rows that may be in such a group.
        """
        self._kind, self._in_eval = kind, in_eval
        order = rows[np.lexsort((address[rows], in_eval[rows], group[rows]))]
        is_new = np.zeros(len(order), bool)
        is_new[:1] = True
        for values in (group, in_eval, address):
            ordered = values[order]
            is_new[1:] |= ordered[1:] != ordered[:-1]
        self._rows = rows = order[is_new]  # one row for each address and split of a group
        starts = np.flatnonzero(np.diff(group[rows], prepend=-1))
        ends = np.append(starts, len(rows))[1:]
        kept = ends - starts > 1
        # A group's rows of the training data are in front of those of the evaluation data.
        self.is_within_one_split = (in_eval[rows[starts]] == in_eval[rows[ends - 1]])[kept]
        self.first_row = np.minimum.reduceat(rows + len(group) * in_eval[rows], starts)[kept] % max(len(group), 1)
        self._starts, self._ends = starts[kept], ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Group:
        members = self._rows[self._starts[number] : self._ends[number]]
        sides = [np.sort(members[self._in_eval[members] == side]) for side in (False, True)]
        listed = np.concatenate([side[:_LISTED_ROWS] for side in sides])
        return Group(self._kind, all(map(len, sides)), len(members), tuple(listed.tolist()))


def _first_groups(kinds: Sequence[_Groups]) -> list[Group]:
    """The groups that are listed: those that leak before the others, each by their rows."""
    numbers = np.concatenate([np.arange(len(groups)) for groups in kinds])
    kind = np.repeat(np.arange(len(kinds)), [len(groups) for groups in kinds])
    order = np.lexsort(
        [
            np.concatenate([groups.first_row for groups in kinds]),
            np.concatenate([groups.is_within_one_split for groups in kinds]),
        ]
    )[:_LISTED_GROUPS]
    chosen = [kinds[kind[place]][int(numbers[place])] for place in order.tolist()]
    return sorted(chosen, key=lambda group: (not group.leaks, group.rows))
