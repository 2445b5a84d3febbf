"""An image is decoded once while it is checked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from minicpmv_finetune.data.checking import inspect_image


def test_a_png_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load_prepare = PngImagePlugin.PngImageFile.load_prepare

    def count(image: PngImagePlugin.PngImageFile) -> None:
        decoded.append(image)
        load_prepare(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", count)
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
    assert inspect_image(str(path)).miniature[::3] == bytes(range(256))
    assert len(decoded) == 1
