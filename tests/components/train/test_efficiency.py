"""What a training took stands beside what `plan` says; the GPU is a name here."""

from pathlib import Path

import pytest
import torch

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.efficiency import Duration, WorkCounter, measure_efficiency, trained_by_part
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.minicpmv.checkpoint import load_model
from tests.example_record import example_record


def _counted() -> WorkCounter:
    counter = WorkCounter()
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    sizes = torch.tensor([[2, 4], [4, 4]], dtype=torch.int32)
    counter.add({"input_ids": labels, "labels": labels, "target_sizes": sizes, "pixel_values": sizes}, [3, 2])
    counter.add({"input_ids": labels[:1], "labels": labels[:1]}, [3])
    return counter


def test_work_is_counted_without_padding() -> None:
    counter = _counted()
    work = counter.work(2)
    assert (work.tokens, work.squared_tokens, work.supervised) == (16, 2 * (9 + 4 + 9), 10)
    assert (work.patches, work.squared_patches, work.runs_tower) == (48, 2 * (64 + 256), True)
    assert (counter.largest_batch, counter.most_patches) == (6, 24)


@pytest.mark.parametrize("gpu", ["", "NVIDIA H100 80GB HBM3", "Unknown 9"])
def test_measured_values_stand_beside_those_of_the_plan(gpu: str, tiny_46: Path) -> None:
    flags = (
        "--use_lora true --tune_llm false --tune_vision false --lora_r 4 --use_cpu true --output_dir o --data_path d"
    )
    arguments = parse(flags.split(), announce=lambda sentence: None)
    model, generation = load_model(tiny_46, torch.float32)
    trained = make_trainable(model, generation, arguments)
    assert sum(trained_by_part(trained, generation).values()) == count_parameters(trained)[0]
    duration = Duration(10.0, 25.0, 0.4)
    found = measure_efficiency(arguments, tiny_46, generation, trained, _counted(), duration, gpu)
    assert found.metrics["tokens/s"] == pytest.approx(0.8)
    assert found.metrics.get("gpu_hours") == (pytest.approx(25 / 3600) if gpu else None)
    known = (
        {"peak_memory_mb", "mfu", "tokens/s", "gpu_hours"} if "H100" in gpu else {"peak_memory_mb"} if gpu else set()
    )
    assert found.planned.keys() == known
    if "H100" in gpu:
        # All speak of the same time; the planned hours are those of all steps, of which this process ran four tenths.
        ratios = {found.planned[name] / found.metrics[name] for name in ("tokens/s", "mfu")}
        ratios.add(25 / 3600 / found.planned["gpu_hours"])
        assert max(ratios) == pytest.approx(min(ratios))


def test_the_record_shows_both() -> None:
    metrics = {"loss": 0.5, "tokens/s": 2000.0, "peak_memory_mb": 9000.0, "mfu": 0.25, "gpu_hours": 1.5}
    planned = {"peak_memory_mb": 10_000.0, "mfu": 0.3}
    record = example_record(metrics=metrics, planned=planned)
    assert record.show("peak_memory_mb", 9000.0) == "9,000 (plan: 10,000)"
    assert "| `mfu` | 0.25 (plan: 0.3) |" in record.markdown()
    assert record.efficiency["efficiency/tokens/s"] == 2000.0
    assert record.efficiency["plan/mfu"] == 0.3
