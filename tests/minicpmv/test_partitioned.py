import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from tests.minicpmv import partitioned_worker


def _cases() -> list[Any]:
    # 2.6, 4.0 and 4.5 share a model class, as 4.6 and 4.7 do, so the others run in `make test-faults` alone.
    seldom = [*(("zero3", version) for version in ("4.0", "4.5", "4.6", "4.7")), ("fsdp2", "2.6")]
    return [
        *(pytest.param(*case) for case in (("zero3", "2.6"), ("fsdp2", "4.6"))),
        *(pytest.param(*case, marks=pytest.mark.faults_only) for case in seldom),
    ]


@pytest.mark.parametrize(("strategy", "version"), _cases())
def test_a_process_without_an_image_trains_together_with_one_that_has_an_image(
    strategy: str, version: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny(version)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, partitioned_worker.__file__, strategy, str(folder), str(tmp_path)],
        check=True,
        timeout=300,
        env=variables,
    )
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # The same training in one process, with the mean of both processes' gradients.
    encoder, (model, _) = Encoder.from_checkpoint(folder), load_model(folder, torch.float32)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    expected: list[list[float]] = [[], []]
    for _ in range(2):
        for rank in range(2):
            loss = model(**partitioned_worker.batch(encoder, shows_image=rank == 0)).loss
            (loss / 2).backward()
            expected[rank].append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), partitioned_worker.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        with torch.no_grad():
            expected[rank].append(model.eval()(**partitioned_worker.batch(encoder, shows_image=rank == 1)).loss.item())
    assert losses == [pytest.approx(row, abs=1e-4) for row in expected]
