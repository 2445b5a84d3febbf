"""A step of a published model on a GPU that computes nothing, as `make gpu-dry-run` does it for all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
ROWS: dict[str, Any] = {
    row["name"]: row
    for row in map(json.loads, (ROOT / "benchmarks" / "results" / "dry-run.jsonl").read_text().splitlines())
}
NAME = "2.6, batch of 2"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_a_step_of_a_published_width_waits_and_takes_memory_as_the_table_says() -> None:
    from gpu_dry_run import LIMIT, cases, run

    # Fewer layers, because each takes a third of a second.
    found = run(next(case for case in cases() if case.name == NAME), layers=3)
    assert found["waits"] == ROWS[NAME]["waits"]
    assert found["peak_of_plan"] == pytest.approx(1, abs=LIMIT)


def test_the_table_has_the_kept_rows() -> None:
    from gpu_dry_run import BEGIN, END, cases, write_table

    assert list(ROWS) == [case.name for case in cases() if case.name in ROWS]
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert write_table(list(ROWS.values())) in page[page.index(BEGIN) : page.index(END)]


def test_a_fake_gpu_refuses_mixed_devices_and_counts_waits_and_memory() -> None:
    from fake_gpu import DEVICE, backward, fake_gpu

    with fake_gpu() as gpu:
        weight = torch.nn.Parameter(torch.empty(256, 256, device=DEVICE))
        ids = torch.tensor([0, 3, 5]).to(DEVICE, non_blocking=True)
        assert not gpu.waits
        rows = weight[ids[ids != 0]]
        assert rows.shape == (2, 256)
        assert int(ids.max()) == 5
        assert sum(gpu.waits.values()) == 2
        loss = rows.sum()
        backward(loss)
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert gpu.memory > 2 * weight.nbytes
        weight.grad = None
        del rows
        assert gpu.memory < 2 * weight.nbytes
        assert gpu.peak > gpu.memory
        with pytest.raises(RuntimeError, match="device"):
            weight + torch.empty(256, 256)
