from collections.abc import Callable
from typing import Any

import pytest
import torch


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
