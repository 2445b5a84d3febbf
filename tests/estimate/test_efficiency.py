import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minicpmv_finetune.estimate import cost
from minicpmv_finetune.estimate.efficiency import Work, needed_flops, peak_flops
from minicpmv_finetune.estimate.published import published_model
from minicpmv_finetune.minicpmv.generations import MINICPMV_4_7

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("gpu-*.jsonl"))
ROWS: list[dict[str, Any]] = [json.loads(line) for path in RESULTS for line in path.read_text().splitlines()]
MEASURED = [row for row in ROWS if "tflop_of_a_step" in row]


@pytest.mark.parametrize(
    ("device", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_the_rate_of_a_card_is_known_by_its_name(device: str, rate: float | None) -> None:
    assert peak_flops(device) == rate


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "{version}-{batch}-{checkpointing}".format(**row["case"]))
def test_needed_operations_are_those_of_the_measured_steps(row: dict[str, Any]) -> None:
    version, samples = row["case"]["version"], row["case"]["batch"]
    model = published_model(version)
    lengths, slices = row["tokens"] / samples, row["patches"] / 32**2
    work = Work(row["tokens"], samples * lengths**2, 100 * samples, row["patches"], slices * 32**4, True)
    trained = {"language": 64 * model.lora_features, "merger": model.parameters["merger"]}
    assert needed_flops(model, trained, work) / 1e12 == pytest.approx(row["tflop_of_a_step"], rel=0.1)


def test_a_stored_tower_needs_nothing_and_a_trained_one_three_times_a_frozen_one() -> None:
    model = published_model("2.6")

    def needed(runs_tower: bool, vision: int) -> float:
        return needed_flops(model, {"vision": vision}, Work(0, 0, 0, 1000, 0, runs_tower))

    stored, whole = needed(False, 0), model.parameters["vision"]
    assert needed(True, whole) - stored == pytest.approx(3 * (needed(True, 0) - stored))
    adapters = needed(True, whole // 100) - stored
    assert 2 * (needed(True, 0) - stored) < adapters < needed(True, whole) - stored


def mixture() -> cost.Model:
    """A model of the size of 4.7-35B-A3B's language model, as its tensors' shapes have it."""
    text = {
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "vocab_size": 248_320,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }
    layer = "model.language_model.layers.0"
    tensors: list[cost.Tensor] = [
        ("model.language_model.embed_tokens.weight", (248_320, 2048), 1),
        ("lm_head.weight", (248_320, 2048), 1),
        (f"{layer}.self_attn.q_proj.weight", (8192, 2048), 40),
        (f"{layer}.mlp.experts.gate_up_proj", (256, 1024, 2048), 40),
        (f"{layer}.mlp.experts.down_proj", (256, 2048, 512), 40),
        (f"{layer}.mlp.shared_expert.up_proj.weight", (512, 2048), 40),
    ]
    config = {"text_config": text, "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27}}
    return cost.measure_model(MINICPMV_4_7, config, tensors)


def test_of_a_mixture_only_the_active_parameters_compute() -> None:
    model = mixture()
    assert model.experts == 40 * 256 * 3 * 512 * 2048
    assert model.total - model.active == pytest.approx(model.experts * 248 / 256)
    assert model.intermediate_size == 9 * 512
    recipe = cost.Recipe(1, 1, 1, True, False, False, 8, 1)
    assert "QLoRA" not in cost.estimate_memory(model, recipe, 2048, 0, True)
    assert cost.estimate_memory(model, recipe, 2048, 0, True)["single GPU"] > 2 * model.total
    dense = replace(model, experts=0, used_experts=1.0)
    flops, all_flops = (cost.estimate_flops(one, recipe, [1000], 0, False) for one in (model, dense))
    assert all_flops / flops == pytest.approx(model.total / model.active, rel=0.2)
    work = Work(1000, 0, 0, 0, 0, False)
    assert needed_flops(model, {}, work) == 4.0 * (model.parameters["language"] - model.idle) * 1000
