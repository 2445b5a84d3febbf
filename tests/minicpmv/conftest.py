from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from minicpmv_finetune.minicpmv import compiled


@pytest.fixture
def count_slices(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Returns a list that receives the number of slices of each call in which a model of 4.6 encodes images."""

    def count_of(model: Any) -> list[int]:
        slices: list[int] = []
        encode = model.model.get_image_features

        def count(pixels: torch.Tensor, sizes: torch.Tensor, **options: Any) -> Any:
            slices.append(len(sizes))
            return encode(pixels, sizes, **options)

        monkeypatch.setattr(model.model, "get_image_features", count)
        return slices

    return count_of


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of threads, of which the second does not divide the number of rows or states."""
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
