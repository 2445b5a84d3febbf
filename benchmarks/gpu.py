"""Training steps of models of the published sizes on one GPU: tokens per second, MFU, and peak memory beside `plan`.

    python benchmarks/gpu.py [--only 2.6 4.6] [--out benchmarks/results/gpu.jsonl]

The weights are random and made on the GPU; speed and memory do not depend on their values. A batch is what the trainer
gets from shards: samples of 2,048 tokens, each with ten slices of 448 × 448 pixels, a hundred supervised tokens. The
trainer is that of the train step, with its loader's workers, in bf16. Adapters of rank 64 are on the layers of the
published default; embeddings and merger are trained whole, the vision tower is frozen. `--scale tiny` runs the same on
a CPU, to find mistakes in this file.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.models.minicpmv4_6 import MiniCPMV4_6Config
from transformers.models.minicpmv4_7 import MiniCPMV4_7Config

from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.callbacks import TrainingMonitor
from minicpmv_finetune.components.train.fused_lora import fuse_adapters
from minicpmv_finetune.components.train.masters import train_in_float32
from minicpmv_finetune.components.train.trainable import count_parameters, make_trainable
from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer
from minicpmv_finetune.components.train.watchdog import Watchdog
from minicpmv_finetune.estimate import cost
from minicpmv_finetune.estimate.efficiency import Work, needed_flops, peak_flops
from minicpmv_finetune.estimate.layers import PUBLISHED_TARGETS, Targets
from minicpmv_finetune.estimate.published import published_sizes
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.configuration import MiniCPMVConfig
from minicpmv_finetune.minicpmv.generations import Generation, generation_named
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.modeling import MiniCPMVForConditionalGeneration
from minicpmv_finetune.minicpmv.modeling_qwen3_5 import (
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7ForConditionalGeneration,
)
from minicpmv_finetune.tracking.step_runs import StepRun

SUPERVISED = 100
WARM_UP = 3
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "triton")

_CANVAS = {
    "rope_type": "default",
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
"""Positions of 4.7: each of their three channels rotates its section of a head's frequencies."""
_MARKERS = {"image_start_id": 5, "image_end_id": 6, "slice_start_id": 7, "slice_end_id": 8, "newline_id": 9}
"""Token ids of 4.7, which finds each slice by the tokens around it."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        version: Generation.
        batch: Number of samples of a batch.
        checkpointing: Whether activations are computed again in the backward pass.
        flags: Further flags of the training script.
        steps: Number of measured steps.
    """

    version: str
    batch: int
    checkpointing: bool
    flags: str = ""
    steps: int = 6


CASES = (
    Case("4.6", 4, False),
    Case("4.6", 4, True),
    Case("4.6", 8, False),
    Case("2.6", 2, False),
    Case("2.6", 4, True),
    Case("4.5", 2, False),
    Case("4.5", 4, True),
    *(Case(version, batch, batch == 4) for version in ("4.0", "4.7") for batch in (2, 4)),
)


@dataclass(frozen=True)
class Size:
    """What a sample contains.

    Attributes:
        tokens: Number of tokens.
        slices: Number of slices.
        side: Side of a slice in patches.
    """

    tokens: int
    slices: int
    side: int

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return min(SUPERVISED, self.tokens // 20)


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["2.6", "4.5", "4.6"], help="generations")
    parser.add_argument("--flags", default="", help="further flags of the training script, such as '--use_dora true'")
    parser.add_argument("--scale", choices=["published", "tiny"], default="published")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no further case begins")
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu_published.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with options.out.open("a") as file:

        def save(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)

        save({"facts": facts()})
        chosen = (case for case in CASES if case.version in options.only)
        for case in (replace(case, flags=options.flags) for case in chosen):
            if time.perf_counter() - started > options.limit:
                save({"case": vars(case), "error": "no time was left"})
                continue
            try:
                save(measure(case, options.scale == "tiny"))
            except Exception as error:
                traceback.print_exc()
                save({"case": vars(case), "error": f"{type(error).__name__}: {str(error)[:300]}"})


def facts() -> dict[str, Any]:
    """The card, its own speed, and the versions of what ran."""
    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "commit": git_commit()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"matmul_tflops": _matmul_rate() / 1e12, "fla": _version("flash-linear-attention")}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _matmul_rate(side: int = 8192, rounds: int = 10) -> float:
    """FLOP/s of a product of random bf16 matrices."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        left @ right
    end.record()
    torch.cuda.synchronize()
    return 2 * side**3 * rounds / (start.elapsed_time(end) / 1e3)


def measure(case: Case, tiny: bool) -> dict[str, Any]:
    """Train a few steps and return what they took."""
    size = Size(tokens=200, slices=3, side=8) if tiny else Size(tokens=2048, slices=10, side=32)
    generation = generation_named(case.version)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse(_flags(case, folder))
        training = arguments.training
        started = time.perf_counter()
        model = make_model(case.version, tiny, torch.device("cuda" if cuda else "cpu"))
        sizes = plan_model(model, generation, Path(folder))
        trained: Any = make_trainable(model, generation, arguments)
        fuse_adapters(trained)
        train_in_float32(trained, generation)
        if training.activation_checkpointing:
            training.activation_checkpointing_kwargs = {"use_reentrant": False}
            trained.enable_input_require_grads()
        creation = time.perf_counter() - started
        samples = Samples(model, generation, size, case.batch * (WARM_UP + case.steps))
        timer = _Timer()
        trainer = _make_trainer(trained, arguments, samples, generation, timer)
        try:
            trainer.train()
        finally:
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            reserved = torch.cuda.max_memory_reserved() if cuda else 0
            trainable, total = count_parameters(trained)
            slowest = _slowest_kernels(trainer, samples, case.batch) if cuda and not case.checkpointing else {}
            del trainer, trained, model
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timer.steps[WARM_UP:])
    tokens = case.batch * size.tokens
    patches = case.batch * size.slices * size.side**2
    lora = arguments.lora
    recipe = cost.Recipe(1, case.batch, 1, True, False, False, lora.lora_r, 1, use_dora=lora.use_dora)
    plan = cost.estimate_memory(sizes, recipe, tokens, patches, case.checkpointing)["single GPU"]
    by_part = {"language": recipe.lora_r * sizes.lora_features, "merger": sizes.parameters["merger"]}
    needed = needed_flops(sizes, by_part, _work(size, case.batch))
    row: dict[str, Any] = {
        "case": vars(case),
        "model": asdict(sizes),
        "tokens": tokens,
        "patches": patches,
        "parameters": {"trainable": trainable, "total": total},
        "seconds_of_creation": round(creation, 1),
        "seconds_of_each_step": [round(step, 4) for step in timer.steps],
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds),
        "samples_per_second": round(case.batch / seconds, 2),
        "tflop_of_a_step": round(needed / 1e12, 1),
        "peak_memory": peak,
        "peak_reserved": reserved,
        "plan": round(plan),
        "peak_of_plan": round(peak / plan, 3),
        "milliseconds_of_kernels": slowest,
    }
    if cuda:
        rate = peak_flops(torch.cuda.get_device_name()) or float("nan")
        row["mfu"] = round(needed / seconds / rate, 4)
    return row


def _flags(case: Case, folder: str) -> list[str]:
    return [
        *("--data_path", "none", "--output_dir", folder, "--use_lora", "true", "--tune_llm", "false"),
        *("--tune_vision", "false", "--per_device_train_batch_size", str(case.batch), "--save_strategy", "no"),
        *("--max_steps", str(WARM_UP + case.steps), "--logging_steps", "1000", "--report_to", "none"),
        *("--gradient_checkpointing", str(case.checkpointing).lower(), "--dataloader_num_workers", "4"),
        *case.flags.split(),
    ]


def _work(size: Size, samples: int) -> Work:
    """What a step processes."""
    slices, patches = samples * size.slices, size.side**2
    return Work(
        tokens=samples * size.tokens,
        squared_tokens=samples * size.tokens**2,
        supervised=samples * size.supervised,
        patches=slices * patches,
        squared_patches=slices * patches**2,
        runs_tower=True,
    )


def make_model(generation: str, tiny: bool, device: torch.device, layers: int | None = None) -> PreTrainedModel:
    """A model of a published size in bf16, with random weights made on the device.

    Args:
        generation: Generation.
        tiny: Whether it is a small one instead.
        device: Device of the weights.
        layers: Number of the language model's layers; by default all.
    """
    sizes = published_sizes(generation)
    text: dict[str, Any] = {**sizes["text"], "max_position_embeddings": 32_768, "tie_word_embeddings": False}
    vision: dict[str, Any] = {**sizes["vision"], "patch_size": 14, "image_size": 980}
    if generation == "4.7":
        text["rope_parameters"] = _CANVAS
    if tiny:
        text |= {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 8}
        text |= {name: 16 for name in text if name.startswith("linear") and name.endswith("dim")}
        text |= {"layer_types": text["layer_types"][:4]} if "layer_types" in text else {}
    if layers is not None:
        text["num_hidden_layers"] = layers
        text |= {"layer_types": text["layer_types"][:layers]} if "layer_types" in text else {}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            if generation not in ("4.6", "4.7"):
                config = MiniCPMVConfig(
                    version=float(generation), query_num=64, image_token_id=3, vision_config=vision, **text
                )
                return MiniCPMVForConditionalGeneration(config)
            options: dict[str, Any] = {
                "image_size": 980,
                "image_token_id": 3,
                "video_token_id": 4,
                "text_config": {**text, "model_type": "qwen3_5_text"},
                "vision_config": vision,
            }
            if generation == "4.6":
                return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**options))
            return MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**(options | _MARKERS)))
    finally:
        torch.set_default_dtype(usual)


class Samples(Dataset[ModelInput]):
    """Samples with random tokens and pixels; each has the same lengths."""

    def __init__(self, model: PreTrainedModel, generation: Generation, size: Size, count: int) -> None:
        self.image_token = int(model.config.image_token_id)
        # Each slice of 32 × 32 patches has 64 tokens in every generation.
        self.tokens_of_slice = model.config.query_num if generation.fixed_tokens else size.side**2 // 16
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> ModelInput:
        random, size = np.random.default_rng(number), self.size
        ids = random.integers(10, self.vocabulary, size.tokens)
        for place in range(size.slices):
            start = 5 + place * (self.tokens_of_slice + 2)
            ids[start : start + self.tokens_of_slice] = self.image_token
            kind = "slice" if place else "image"
            ids[start - 1] = _MARKERS[f"{kind}_start_id"]
            ids[start + self.tokens_of_slice] = _MARKERS[f"{kind}_end_id"]
        labels = np.full(size.tokens, IGNORED_LABEL)
        labels[-size.supervised :] = ids[-size.supervised :]
        side = size.side * 14
        slices = [random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(size.slices)]
        return ModelInput(str(number), ids.tolist(), labels.tolist(), slices)


def _collate(samples: Sequence[ModelInput], collate_rows: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return {**collate_rows(samples), "rows": [int(sample.id) for sample in samples]}


class _Timer(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now


def _make_trainer(model: Any, arguments: Any, samples: Samples, generation: Generation, timer: _Timer) -> Any:
    training = arguments.training
    lengths = [samples.size.tokens] * len(samples)
    monitor = TrainingMonitor(StepRun(), lengths)
    watchdog = Watchdog(training.ddp_timeout, 0)
    rows = partial(collate, pad_token_id=0, patch_size=14, padding_side="right", resampler=generation.resampler)
    return MiniCPMVTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        data_collator=partial(_collate, collate_rows=rows),
        callbacks=[monitor, watchdog, timer],
        monitor=monitor,
        watchdog=watchdog,
        sample_ids=lambda numbers: [str(number) for number in numbers],
        lengths=lengths,
    )


def _slowest_kernels(trainer: Any, samples: Samples, batch_size: int) -> dict[str, float]:
    """Milliseconds of the fifteen kinds of kernels that take the most time of a step, and of all together."""
    batch = trainer.data_collator([samples[number] for number in range(batch_size)])
    batch = {name: value.to("cuda") for name, value in batch.items() if isinstance(value, torch.Tensor)}
    trainer.model.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.model(**batch, loss_only=True, use_cache=False).loss
        loss.backward()
        torch.cuda.synchronize()
    times = {event.key[:90]: event.self_device_time_total / 1e3 for event in found.key_averages()}
    slowest = sorted(times.items(), key=lambda item: -item[1])[:15]
    return {"all": round(sum(times.values()), 1)} | {name: round(time, 1) for name, time in slowest}


def plan_model(
    model: PreTrainedModel, generation: Generation, folder: Path, targets: Targets = PUBLISHED_TARGETS
) -> cost.Model:
    """The numbers that `plan` reads from a checkpoint; its weights are a file of holes here."""
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in model.named_parameters():
        end = place + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    written = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + place)
    config = model.config.to_dict()
    fields = {"model_type": generation.model_type, "version": generation.published_version}
    (folder / "config.json").write_text(json.dumps({**config, **fields}, default=str))
    return cost.read_model(folder, targets)


if __name__ == "__main__":
    main()
