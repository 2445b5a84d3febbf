"""Samples that begin with the same images, such as several questions about one image, in groups that share them.

A group's row has the tokens up to the last image once, and then the rest of each conversation; `minicpmv/packed.py`
computes it. Images are equal if their stored bytes are.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

from .format import ShardReader


@dataclass(frozen=True)
class Beginning:
    """The tokens of a sample up to its last image, and the images.

    Attributes:
        digest: Digest of tokens and images; empty if there is nothing that samples could share.
        tokens: Number of these tokens.
    """

    digest: bytes
    tokens: int


@dataclass(frozen=True)
class SharedImages:
    """Which samples share their images.

    Attributes:
        groups: The numbers of all samples in groups; the samples of a group share a row.
        shared: Number of first tokens that a sample shares with the one before it in its group, by its number; the
            first sample of each group is missing.
    """

    groups: list[list[int]]
    shared: dict[int, int]

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """Number of tokens of each group's row.

        Args:
            lengths: Number of tokens of each sample by itself.
        """
        return [row_length(group, lengths, self.shared) for group in self.groups]


def row_length(numbers: Sequence[int], lengths: Sequence[int], shared: Mapping[int, int]) -> int:
    """Number of tokens of a row of samples.

    Args:
        numbers: The samples of the row.
        lengths: Number of tokens of each sample by itself.
        shared: Number of first tokens that a sample shares with the one before it in its row, by its number.
    """
    return sum(lengths[number] - shared.get(number, 0) for number in numbers)


def share_images(beginnings: Sequence[Beginning], lengths: Sequence[int], capacity: int, seed: int = 0) -> SharedImages:
    """Group samples that begin with the same images.

    Args:
        beginnings: The beginning of each sample.
        lengths: Number of tokens of each sample.
        capacity: Largest number of tokens of a group's row; samples for which there is no room begin another group.
        seed: Determines which of too many samples come together.
    """
    groups: list[list[int]] = []
    shared: dict[int, int] = {}
    last: dict[bytes, int] = {}  # number of the last group with this beginning
    room: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        beginning = beginnings[number]
        group, own = last.get(beginning.digest), lengths[number] - beginning.tokens
        if beginning.digest and group is not None and own <= room[group]:
            groups[group].append(number)
            shared[number] = beginning.tokens
            room[group] -= own
            continue
        last[beginning.digest] = len(groups)
        groups.append([number])
        room.append(capacity - lengths[number])
    return SharedImages(groups, shared)


def read_beginnings(reader: ShardReader, image_token_id: int) -> Iterator[Beginning]:
    """The beginning of each sample of a split, in order; reads the split once.

    Args:
        reader: The split.
        image_token_id: Id of the token in whose place the model puts an image's features.
    """
    for row in reader.stored_rows():
        tokens = shareable_tokens(row.input_ids, row.labels, image_token_id)
        digest = hashlib.sha256(np.asarray([tokens, *row.images.layout], dtype=np.int64).tobytes())
        digest.update(np.asarray(row.input_ids[:tokens], dtype=np.int64).tobytes())
        for part in row.images.parts:
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        yield Beginning(digest.digest() if tokens else b"", tokens)


def shareable_tokens(input_ids: Sequence[int], labels: Sequence[int], image_token_id: int) -> int:
    """Number of tokens up to the one that closes the last image; 0 if samples must not share them.

    They must not if there is no image, if nothing follows, or if the loss needs what these tokens predict.
    """
    places = np.flatnonzero(np.asarray(input_ids) == image_token_id)
    tokens = int(places[-1]) + 2 if len(places) else 0
    is_supervised = bool((np.asarray(labels[: tokens + 1]) != IGNORED_LABEL).any())
    return 0 if is_supervised or tokens >= len(input_ids) else tokens
