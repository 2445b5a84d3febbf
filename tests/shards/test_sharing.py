"""Samples that begin with the same images come together, and no others."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL
from minicpmv_finetune.shards.codecs import StoredImages
from minicpmv_finetune.shards.format import StoredRow
from minicpmv_finetune.shards.sharing import Beginning, Beginnings, read_beginnings, share_images, shareable_tokens

IMAGE = 3


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=60), st.integers(50, 120), st.integers(0, 9))
def test_groups_lose_no_sample_and_fit_a_row(samples: list[tuple[int, int]], capacity: int, seed: int) -> None:
    # Number 0 shares nothing; the others have a beginning of ten tokens each.
    beginnings = [Beginning(bytes([image]) if image else b"", 10 * bool(image)) for image, _ in samples]
    lengths = [beginning.tokens + own for beginning, (_, own) in zip(beginnings, samples, strict=True)]
    found = share_images(Beginnings.of(beginnings), lengths, capacity, seed)
    assert sorted(number for group in found.groups for number in group) == list(range(len(samples)))
    for group, length in zip(found.groups, found.lengths(lengths), strict=True):
        assert len({beginnings[number].digest for number in group}) == 1
        assert len(group) == 1 or beginnings[group[0]].digest
        assert length == sum(lengths[number] for number in group) - 10 * (len(group) - 1) <= capacity
        assert [found.shared[number] for number in group] == [0, *[10] * (len(group) - 1)]


@pytest.mark.parametrize(
    ("ids", "supervised", "expected"),
    [
        ([1, 3, 3, 4, 6, 7], [5], 4),
        ([1, 3, 5, 3, 4, 6, 7], [6], 5),
        ([1, 5, 6, 7], [3], 0),  # no image
        ([1, 3, 3, 4, 5], [4], 0),  # the token that closes the image predicts a supervised token
        ([1, 5, 3, 4, 6, 7], [1, 5], 0),  # an answer in front of the image
        ([1, 3, 3, 4], [], 0),  # nothing behind the image
    ],
)
def test_what_may_be_shared_ends_with_the_last_image(ids: list[int], supervised: list[int], expected: int) -> None:
    labels = [token if place in supervised else IGNORED_LABEL for place, token in enumerate(ids)]
    assert shareable_tokens(ids, labels, IMAGE) == expected


def test_equal_beginnings_have_equal_images_and_tokens() -> None:
    def row(ids: list[int], *images: bytes, layout: int = 0) -> StoredRow:
        labels = [IGNORED_LABEL] * (len(ids) - 1) + ids[-1:]
        return StoredRow("", ids, labels, StoredImages(images, [layout]))

    class Reader:
        def stored_rows(self) -> list[StoredRow]:
            return [
                row([1, 3, 4, 5, 6], b"one"),
                row([1, 3, 4, 7, 8, 9], b"one"),
                row([1, 3, 4, 5, 6], b"two"),
                row([2, 3, 4, 5, 6], b"one"),
                row([1, 3, 4, 5, 6], b"one", layout=1),
                row([1, 3, 4, 5, 6], b"o", b"ne"),
                row([1, 5, 6], b""),
            ]

    reader: Any = Reader()
    beginnings = list(read_beginnings(reader, IMAGE))
    assert [beginning.tokens for beginning in beginnings] == [3, 3, 3, 3, 3, 3, 0]
    assert beginnings[0] == beginnings[1]
    assert len({beginning.digest for beginning in beginnings}) == 6
