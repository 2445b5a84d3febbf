"""A training step of each published model and each recipe on a GPU that computes nothing (`fake_gpu`).

    python benchmarks/gpu_dry_run.py [NAME …]

Shown for each: that no operation mixes devices, where the program waits for the GPU, and how much memory the step
takes at its peak, beside what `plan` says and, where it was measured, what a card took. The rows are kept in
benchmarks/results/dry-run.jsonl, and the table is written into docs/gpu.md.

The model, its adapters, their types, the batch, the loss and the optimizer are those of the train step. Three things
are not simulated but added, and the table says where: what a process of several keeps of a divided optimizer, the
buckets in which processes exchange gradients, and 4-bit weights, which are bytes here that each layer expands.
"""

import argparse
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fake_gpu import DEVICE, backward, fake_gpu
from gpu import CASES, Samples, Size, make_model, plan_model
from pages import replace_part
from torch import nn
from transformers.initialization import no_init_weights

from minicpmv_finetune.components.train.arguments import Arguments, parse
from minicpmv_finetune.components.train.flags import adapter_targets, as_flags, pop_num_nodes, table, take_processes
from minicpmv_finetune.components.train.fused_lora import fuse_adapters
from minicpmv_finetune.components.train.masters import train_in_float32
from minicpmv_finetune.components.train.quantized import prepare_four_bit
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.estimate import cost
from minicpmv_finetune.inputs.recipe import RECIPES, read_recipe
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.generations import Generation, generation_named
from minicpmv_finetune.minicpmv.packed import enable_packing

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).parent / "results" / "dry-run.jsonl"
CARD_ROWS = Path(__file__).parent / "results" / "gpu-h200.jsonl"
PAGE = ROOT / "docs" / "gpu.md"
STRATEGIES = ROOT / "minicpmv_finetune" / "components" / "train" / "strategies"
BEGIN, END = "<!-- written by benchmarks/gpu_dry_run.py -->", "<!-- end -->"
SLICES, SIDE = 10, 32  # of each sample: an image in nine slices and its overview, 448 × 448 pixels each
LIMIT = 0.2
"""By how much the peak may differ from `plan`."""

_FLOAT32, _BF16 = 4, 2
_PLACES = {"benchmarks/gpu_dry_run.py:_step": "the backward pass of embeddings with images in their places"}
_LORA = {"use_lora": True, "tune_llm": False, "tune_vision": False}


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        name: Its name in the table.
        version: Generation.
        flags: Flags of the training script.
        processes: Number of GPUs.
        tokens: Number of tokens of each sample, or of a row with several samples.
        samples: Number of samples in a row.
        card: Peak of its memory on a card, where it was measured, in bytes.
    """

    name: str
    version: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    tokens: int = 2048
    samples: int = 1
    card: int = 0

    @property
    def strategy(self) -> str:
        """How several processes share the work."""
        return str(self.flags.get("strategy", "ddp"))


def cases() -> Iterator[Case]:
    """The published defaults of each generation, of which some were measured on a card, and all recipes."""
    measured = [json.loads(line) for line in CARD_ROWS.read_text().splitlines()]
    peaks = {
        (row["case"]["version"], row["case"]["batch"], row["case"]["checkpointing"]): row["peak_memory"]
        for row in measured
        if "peak_memory" in row
    }
    wanted = [(case.version, case.batch, case.checkpointing) for case in CASES]
    for version, batch, checkpointing in sorted(wanted):
        flags = {**_LORA, "per_device_train_batch_size": batch, "gradient_checkpointing": checkpointing}
        name = f"{version}, batch of {batch}{', checkpointing' if checkpointing else ''}"
        yield Case(name, version, flags, card=peaks.get((version, batch, checkpointing), 0))
    for version in ("2.6", "4.7"):
        flags = {**_LORA, "per_device_train_batch_size": 2, "packing": True}
        yield Case(f"{version}, batch of 2, packing", version, flags, samples=2)
    for name in RECIPES:
        recipe = read_recipe(name)
        flags = {key: value for key, value in recipe.items() if key in table()}
        flags |= recipe["training_flags"]
        pop_num_nodes(flags)
        _, processes = take_processes(as_flags(flags))
        flags.pop("nproc_per_node", None)
        yield Case(name, name[:3], flags, processes or 1, int(recipe["model_max_length"]))


def main() -> None:
    """Run the named cases, or all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 4.6 or 2.6-24gb")
    names = parser.parse_args().names
    kept_rows = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows: dict[str, Any] = {row["name"]: row for row in map(json.loads, kept_rows)}
    known = list(cases())
    for case in known:
        if not names or case.name.startswith(tuple(names)):
            rows[case.name] = run(case)
            print(json.dumps(rows[case.name]), flush=True)
            kept = [rows[one.name] for one in known if one.name in rows]
            ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    replace_part(PAGE, BEGIN, END, f"\n{write_table([rows[one.name] for one in known if one.name in rows])}")


def run(case: Case, layers: int | None = None) -> dict[str, Any]:
    """One training step.

    Args:
        case: The training.
        layers: Number of the language model's layers; by default all.

    Returns:
        The row of the table: peak and plan in bytes, and the places where the program waits, with their numbers.
    """
    generation = generation_named(case.version)
    with tempfile.TemporaryDirectory() as folder, fake_gpu() as gpu:
        arguments = _parse(case, folder)
        batch_size = arguments.training.per_device_train_batch_size
        with no_init_weights():  # nothing has a value
            model = make_model(case.version, False, DEVICE, layers)
            sizes = plan_model(model, generation, Path(folder), adapter_targets(vars(arguments.lora)))
            trained = _prepare(case, model, generation, arguments)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = None if case.strategy == "zero2" else _warm_optimizer(parameters)
        size = Size(case.tokens // case.samples, SLICES // case.samples, SIDE)
        samples = Samples(trained, generation, size, batch_size * case.samples)
        rows = [samples[number] for number in range(len(samples))]
        if arguments.training.packing:
            batch = collate_packed(rows, 14, generation.resampler, normalized=False)
        else:
            batch = collate(rows, 0, 14, "right", generation.resampler, normalized=False)
        gc.collect()
        gpu.waits.clear()
        gpu.reset_peak()
        _step(trained, batch, parameters, optimizer)
        count, _ = count_parameters(trained)
        peak = gpu.peak + _added(case, count)
        waits = Counter(gpu.waits)
    plan = _plan(case, sizes, arguments, batch_size)
    return {
        "name": case.name,
        "strategy": _strategy(case, arguments),
        "peak": peak,
        "plan": round(plan),
        "peak_of_plan": round(peak / plan, 3),
        "card": case.card,
        "trained": count,
        "waits": dict(sorted(waits.items())),
    }


def _parse(case: Case, folder: str) -> Arguments:
    """Parse a training's flags; one that divides the work needs GPUs, so it stays out."""
    flags = {name: value for name, value in case.flags.items() if name != "strategy"}
    fixed = {"data_path": "none", "output_dir": folder, "bf16": True, "report_to": "none"}
    return parse(as_flags({**flags, **fixed}), announce=lambda sentence: None)


def _prepare(case: Case, model: Any, generation: Generation, arguments: Arguments) -> Any:
    """The model as the train step prepares it."""
    training = arguments.training
    if arguments.lora.q_lora:
        _quantize(model.get_submodule(generation.language_model))
        model.is_loaded_in_4bit = True
        prepare_four_bit(model, training)
    if training.packing:
        enable_packing(model, generation.language_model)
    divided = case.strategy == "zero2"
    training.deepspeed = "zero2" if divided else None  # then adapters have the type of the weights
    trained: Any = make_trainable(model, generation, arguments)
    if training.use_lora and training.fused_lora:
        fuse_adapters(trained)
    if not divided:
        train_in_float32(trained, generation)
    if training.activation_checkpointing:
        trained.enable_input_require_grads()
        trained.activation_checkpointing_enable({"use_reentrant": False})
    return trained.train()


class _FourBits(nn.Linear):
    """A linear layer whose weights are half a byte each; bitsandbytes expands them at each use, as here."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output."""
        output: torch.Tensor = _Expanded.apply(input, self.weight, self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, packed: torch.Tensor, outputs: int) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.outputs = outputs
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else input.dtype
        ctx.dtype = input.dtype
        return input.to(dtype) @ input.new_empty(outputs, input.shape[-1], dtype=dtype).t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        gradient = grad_outputs[0]
        weight = gradient.new_empty(ctx.outputs, packed.shape[-1] // ctx.outputs * 2)
        return (gradient @ weight).to(ctx.dtype), None, None


def _quantize(language_model: nn.Module) -> None:
    for module in language_model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _FourBits
            size = module.weight.numel()
            # The doubly quantized scales take 0.127 bits for each weight.
            module.weight = nn.Parameter(torch.empty(size // 2, dtype=torch.uint8, device=DEVICE), requires_grad=False)
            module.scales = torch.empty(size * 127 // 8000, dtype=torch.uint8, device=DEVICE)


def _warm_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer with its state, as it is from the second step on."""
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _step(model: Any, batch: Mapping[str, Any], parameters: Sequence[nn.Parameter], optimizer: Any) -> None:
    """Forward pass, backward pass and, if there is an optimizer, its step."""
    moved = {
        name: value.to(DEVICE, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**moved, loss_only=True, use_cache=False).loss
    backward(loss, keep=optimizer is not None)
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _added(case: Case, trained: int) -> int:
    """Bytes of what several processes need besides the step itself."""
    if case.processes == 1:
        return 0
    if case.strategy == "ddp":
        return _FLOAT32 * trained  # buckets
    # ZeRO-2: a part of the gradients and of Adam's state with its float32 weights; two buckets.
    settings = json.loads((STRATEGIES / "zero2.json").read_text())["zero_optimization"]
    bucket = settings["reduce_bucket_size"]  # elements; DeepSpeed fills one while it sends another
    return (_BF16 + 3 * _FLOAT32) * trained // case.processes + 2 * _BF16 * min(bucket, trained)


def _plan(case: Case, model: cost.Model, arguments: Arguments, batch_size: int) -> float:
    training, lora = arguments.training, arguments.lora
    recipe = cost.Recipe(
        case.processes,
        batch_size,
        1,
        training.use_lora,
        training.tune_vision,
        training.tune_llm,
        lora.lora_r,
        1,
        whole=("merger",) if "none" in lora.lora_modules_to_save else ("embeddings", "merger"),
        use_dora=lora.use_dora,
    )
    tokens, patches = batch_size * case.tokens, batch_size * SLICES * SIDE**2
    sizes = cost.estimate_memory(model, recipe, tokens, patches, bool(training.activation_checkpointing))
    return sizes[_strategy(case, arguments)]


def _strategy(case: Case, arguments: Arguments) -> str:
    """The strategy's name in the result of `plan`."""
    if arguments.lora.q_lora:
        return "QLoRA"
    return {"ddp": "DDP", "zero2": "ZeRO-2"}[case.strategy] if case.processes > 1 else "single GPU"


def write_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, and the places of waiting as a list."""
    lines = [
        "| Training | Strategy | Devices mixed | Waits | Peak | `plan` | Peak / `plan` | On the card |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['peak_of_plan']:.2f}"
        if abs(row["peak_of_plan"] - 1) > LIMIT:
            ratio = f"**{ratio}, missed**"
        card = f"{row['card'] / 1e9:.1f} GB" if row["card"] else ""
        sizes = " | ".join(f"{row[name] / 1e9:.1f} GB" for name in ("peak", "plan"))
        waits = sum(row["waits"].values())
        lines.append(f"| {row['name']} | {row['strategy']} | none | {waits} | {sizes} | {ratio} | {card} |")
    ratios = [row["card"] / row["peak"] for row in rows if row["card"]]
    if ratios:
        lines += ["", f"Where the card was measured, it took {min(ratios):.2f} to {max(ratios):.2f} times this peak."]
    places: dict[str, list[int]] = {}
    for row in rows:
        for place, count in row["waits"].items():
            places.setdefault(_PLACES.get(place, place), []).append(count)
    lines += ["", "Places where the program waits for the GPU, and how often in a step:", ""]
    for place, counts in sorted(places.items()):
        often = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines.append(f"- `{place}`: {often}, in {len(counts)} of {len(rows)} trainings")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
