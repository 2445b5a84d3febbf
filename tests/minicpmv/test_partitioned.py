"""Each strategy trains and evaluates in two processes, of which one has no image, as one process does."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_finetune.minicpmv.conversation import Encoder
from tests.minicpmv import partitioned_worker
from tests.warm_processes import WarmProcess

WORKER = "tests.minicpmv.partitioned_worker"

# 2.6, 4.0 and 4.5 share a model class, as 4.6 and 4.7 do. "4.6-tied" has a head that is the embeddings' matrix.
EVERYTHING = tuple(
    f"{version}:{kind}:{dtype}"
    for version in ("2.6", "4.6", "4.6-tied")
    for kind in ("full", "lora")
    for dtype in ("float32", "bf16")
)


def _cases() -> list[Any]:
    seldom = [(name, EVERYTHING) for name in ("ddp", "zero2", "zero3", "fsdp2")]
    others = tuple(f"{version}:full:float32" for version in ("4.0", "4.5", "4.7"))
    return [
        pytest.param("zero3", ("2.6:full:float32",), id="zero3"),
        pytest.param("fsdp2", ("4.6-tied:lora:bf16", "4.6:full:float32"), id="fsdp2"),
        *(pytest.param(*case, id=f"{case[0]}-all", marks=pytest.mark.faults_only) for case in seldom),
        pytest.param("zero3", others, id="zero3-others", marks=pytest.mark.faults_only),
    ]


@pytest.mark.parametrize(("strategy", "cases"), _cases())
def test_a_process_without_an_image_trains_together_with_one_that_has_an_image(
    strategy: str, cases: Sequence[str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = {case: _checkpoint(case.partition(":")[0], tiny, tmp_path) for case in cases}
    named = [f"{case}:{folder}" for case, folder in folders.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables = {**os.environ, **together, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        WarmProcess(WORKER, [strategy, str(tmp_path), *named], {**variables, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(500) for process in processes] == [0, 0]
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for case, name in zip(cases, named, strict=True):
        found = [rank[name] for rank in losses]
        expected = _losses_of_one_process(folders[case], case.split(":")[1])
        absolute, relative = (1e-4, 0.0) if case.endswith("float32") else (0.0, 0.02)
        assert found == [pytest.approx(row, rel=relative, abs=absolute) for row in expected], case


def _losses_of_one_process(folder: Path, kind: str) -> list[list[float]]:
    """The same training in one process in float32, with the mean of both processes' gradients."""
    encoder, model = Encoder.from_checkpoint(folder), partitioned_worker.prepare(folder, kind, "float32", "ddp")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = partitioned_worker.adam(trained)
    losses: list[list[float]] = [[], []]
    model.train()
    for _ in range(2):
        for rank in range(2):
            loss = model(**partitioned_worker.batch(encoder, shows_image=rank == 0), use_cache=False).loss
            (loss / 2).backward()
            losses[rank].append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, partitioned_worker.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for rank in range(2):
        with torch.no_grad():
            batch = partitioned_worker.batch(encoder, shows_image=rank == 1)
            losses[rank].append(model(**batch, use_cache=False).loss.item())
    return losses


def _checkpoint(version: str, tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny checkpoint, on request with a head that is the embeddings' matrix."""
    published, _, tied = version.partition("-")
    if not tied:
        return tiny(published)
    folder = tmp_path / version
    if not folder.exists():
        shutil.copytree(tiny(published), folder)
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
