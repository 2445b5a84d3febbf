import os
from pathlib import Path

import pytest

# Two test processes share two cores; without this each would start a thread a core for every matrix product.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_46(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniCPM-V 4.6 checkpoint of a million random parameters."""
    from minicpmv_finetune.pipelines.demo import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny_46"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, `eval.json` and the pictures of handwritten digits."""
    from minicpmv_finetune.pipelines.demo import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, seed=0)
    return folder
