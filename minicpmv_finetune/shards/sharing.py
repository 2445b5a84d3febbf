"""Samples that begin with the same images, such as several questions about one image, in groups that share them.

A group's row has the tokens up to the last image once, and then the rest of each conversation; `minicpmv/packed.py`
computes it. Images are equal if their stored bytes are.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

from .format import ShardReader
from .packing import Packs, one_by_one

_DIGEST = 16  # bytes by which beginnings are compared


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
class Beginnings:
    """The beginnings of samples, eight bytes each.

    Attributes:
        kinds: A number for each sample, the same for equal beginnings.
        tokens: Number of tokens of each sample's beginning; 0 if there is nothing that samples could share.
    """

    kinds: NDArray[np.int32]
    tokens: NDArray[np.int32]

    @classmethod
    def of(cls, beginnings: Iterable[Beginning]) -> "Beginnings":
        """Number the beginnings of samples."""
        digests, tokens = bytearray(), array("i")
        for beginning in beginnings:
            digests += beginning.digest[:_DIGEST].ljust(_DIGEST, b"\0")
            tokens.append(beginning.tokens)
        words = np.frombuffer(digests, np.uint64).reshape(-1, _DIGEST // 8)
        order = np.lexsort(words.T)
        kinds = np.zeros(len(order), np.int32)
        kinds[order[1:]] = (words[order[1:]] != words[order[:-1]]).any(axis=1).cumsum()
        return cls(kinds, np.asarray(tokens))


@dataclass(frozen=True)
class SharedImages:
    """Which samples share their images.

    Attributes:
        groups: The numbers of all samples in groups; the samples of a group share a row.
        shared: Number of first tokens that each sample shares with the one before it in its group, by its number; 0
            for the first sample of each group.
    """

    groups: Packs
    shared: Sequence[int]

    def lengths(self, lengths: Sequence[int]) -> Sequence[int]:
        """Number of tokens of each group's row.

        Args:
            lengths: Number of tokens of each sample by itself.
        """
        return row_lengths(self.groups, lengths, self.shared)


def row_lengths(rows: Iterable[Sequence[int]], lengths: Sequence[int], shared: Sequence[int]) -> Sequence[int]:
    """Number of tokens of rows of samples.

    Args:
        rows: The samples of each row.
        lengths: Number of tokens of each sample by itself.
        shared: Number of first tokens that a sample shares with the one before it in its row, by its number.
    """
    return array("q", (sum(lengths[number] - shared[number] for number in row) for row in rows))


def nothing_shared(samples: int) -> Sequence[int]:
    """The shared tokens of each sample where none has any."""
    return array("i", [0]) * samples


def share_images(beginnings: Beginnings, lengths: Sequence[int], capacity: int, seed: int = 0) -> SharedImages:
    """Group samples that begin with the same images.

    Args:
        beginnings: The beginnings of the samples.
        lengths: Number of tokens of each sample.
        capacity: Largest number of tokens of a group's row; samples for which there is no room begin another group.
        seed: Determines which of too many samples come together.
    """
    shared = array("i", [0]) * len(lengths)
    groups, room = array("i"), array("q")  # group of each sample in their order, and tokens that a group still takes
    last = array("i", [-1]) * (int(beginnings.kinds.max(initial=0)) + 1)  # the last group with a beginning
    order = np.random.default_rng(seed).permutation(len(lengths))
    for number in one_by_one(order):
        kind, tokens = beginnings.kinds[number], int(beginnings.tokens[number])
        group, own = last[kind], lengths[number] - tokens
        if tokens and group >= 0 and own <= room[group]:
            shared[number] = tokens
            room[group] -= own
        else:
            last[kind] = group = len(room)
            room.append(capacity - lengths[number])
        groups.append(group)
    return SharedImages(Packs.by_number(order, np.asarray(groups)), shared)


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
