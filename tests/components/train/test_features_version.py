"""The features of a vision tower equal those in a golden file, so that no change of them goes unnoticed.

The golden file belongs to one `FEATURES_VERSION`, which is part of the name of a feature store. Weights and pixels are
computed from their positions, and features are compared with a tolerance, so the file does not depend on the machine.
`python -m tests.components.train.test_features_version` writes the golden file.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from minicpmv_finetune.components.train.feature_store import FEATURES_VERSION, Encoding, compute_features
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.tiny_checkpoint import VERSIONS, write_tiny_checkpoint
from minicpmv_finetune.pipelines.demo import DEMO_CORPUS

GOLDEN = Path(__file__).with_name("golden_features.json")
COMMAND = "python -m tests.components.train.test_features_version"
PATCH_SIZE = 14
SLICES = ((4, 8), (8, 4), (4, 4))  # (rows, columns) in patches


def _noise(count: int, offset: int) -> NDArray[np.int64]:
    """Integers from 0 to 2047 that follow from their positions alone."""
    return ((np.arange(count, dtype=np.int64) + offset) * 2_654_435_761 >> 9) % 2048


def _set_weights(model: nn.Module) -> None:
    """Replace all weights by values that follow from their names and positions alone."""
    for name, parameter in model.named_parameters():
        values = _noise(parameter.numel(), zlib.crc32(name.encode()) % 10_007) / 1024 - 1
        if parameter.dim() > 1:
            values /= np.sqrt(parameter.numel() / len(parameter))
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        parameter.data = torch.from_numpy(values).to(parameter.dtype).view(parameter.shape)


def _features(checkpoint: Path) -> dict[str, Any]:
    """The features of a few slices, each vector projected on three directions: of the tower, and of the merger."""
    model, generation = load_model(checkpoint, torch.float32)
    for module in (generation.vision_tower, generation.merger):
        _set_weights(model.get_submodule(module))
    shapes = [(PATCH_SIZE * rows, PATCH_SIZE * columns, 3) for rows, columns in SLICES]
    pixels = [(_noise(int(np.prod(shape)), 1) // 8).astype(np.uint8).reshape(shape) for shape in shapes]
    row = ModelInput(id="", input_ids=[0], labels=[0], slices=pixels)
    batch = collate([row], 0, PATCH_SIZE, "right", generation.resampler)
    encodings = {"tower": Encoding(torch.device("cpu")), "merger": Encoding(torch.device("cpu"), merged=True)}
    return {name: _project(model, encoding, batch) for name, encoding in encodings.items()}


def _project(model: Any, encoding: Encoding, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        features = compute_features(model.eval(), encoding, batch["pixel_values"], batch["target_sizes"])
    directions = torch.from_numpy(_noise(3 * features.shape[1], 2) / 1024 - 1).float().view(features.shape[1], 3)
    projections = features @ directions / features.shape[1] ** 0.5
    return {"shape": list(features.shape), "projections": [[round(x, 5) for x in row] for row in projections.tolist()]}


def _are_equal(features: dict[str, Any], expected: dict[str, Any]) -> bool:
    return features.keys() == expected.keys() and all(
        one["shape"] == expected[name]["shape"]
        and np.allclose(one["projections"], expected[name]["projections"], rtol=1e-4, atol=1e-4)
        for name, one in features.items()
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_features_match_the_golden_values(version: str, tiny: Callable[[str], Path]) -> None:
    golden = json.loads(GOLDEN.read_text())
    remedy = (
        f"the features of MiniCPM-V {version} have changed; if that is intended, raise FEATURES_VERSION in "
        f"feature_store.py, so that features that were stored before are not used, and run `{COMMAND}`"
    )
    assert _are_equal(_features(tiny(version)), golden["features"][version]), remedy


def test_the_golden_values_belong_to_this_version() -> None:
    assert json.loads(GOLDEN.read_text())["version"] == FEATURES_VERSION, f"run `{COMMAND}`"


def _write_golden() -> None:
    """Write the golden file; refuses to replace values of the same version by others."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            version: _features(write_tiny_checkpoint(Path(folder) / version, version, corpus=DEMO_CORPUS))
            for version in VERSIONS
        }
    if GOLDEN.exists() and (old := json.loads(GOLDEN.read_text()))["version"] == FEATURES_VERSION:
        for version in VERSIONS:
            if version in old["features"] and not _are_equal(found[version], old["features"][version]):
                sys.exit(f"The features of MiniCPM-V {version} have changed; raise FEATURES_VERSION.")
    features = ",\n".join(f'"{version}": {json.dumps(summary)}' for version, summary in found.items())
    GOLDEN.write_text(f'{{"version": {FEATURES_VERSION},\n"features": {{\n{features}\n}}}}\n')


if __name__ == "__main__":
    _write_golden()
