"""What a training took, beside what `plan` says: tokens a second, memory, GPU hours, share of the GPU's rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from minicpmv_finetune.estimate.cost import Model, Recipe, count_flops, estimate_memory, read_model
from minicpmv_finetune.estimate.efficiency import Work, expected_hours, needed_flops, peak_flops
from minicpmv_finetune.estimate.layers import part_of
from minicpmv_finetune.minicpmv.adapters import PEFT_PREFIX
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

from .arguments import Arguments
from .flags import adapter_targets
from .trainable import parameter_size

_SECONDS_PER_HOUR = 3600


class WorkCounter:
    """Counts what this process computes; sums stay on its device, so that no step waits for them."""

    def __init__(self) -> None:
        """Start at zero."""
        self.tokens = self.squared_tokens = 0
        self.largest_batch = 0
        self.runs_tower = False
        self._sums: torch.Tensor | None = None
        self._most_patches: torch.Tensor | None = None

    def add(self, inputs: Mapping[str, Any], lengths: list[int], shared: int = 0) -> None:
        """Count a batch.

        Args:
            inputs: The model's arguments.
            lengths: Number of tokens of each sample in it.
            shared: Number of these tokens that the batch does not have again.
        """
        self.tokens += sum(lengths) - shared
        self.squared_tokens += sum(length**2 for length in lengths)
        self.largest_batch = max(self.largest_batch, inputs["input_ids"].numel())
        self.runs_tower |= "pixel_values" in inputs
        labels = inputs.get("labels")
        sizes = inputs.get("target_sizes")
        supervised = (labels != IGNORED_LABEL).sum() if labels is not None else torch.zeros(())
        patches = sizes.prod(1).double() if sizes is not None else torch.zeros(1, dtype=torch.float64)
        sums = torch.stack([supervised.double().to(patches.device), patches.sum(), patches.square().sum()])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        most = patches.sum()
        self._most_patches = most if self._most_patches is None else torch.maximum(self._most_patches.to(most), most)

    def work(self, processes: int) -> Work:
        """What all processes have computed; each is assumed to have had as much as this one."""
        sums = [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()
        supervised, patches, squared = (processes * value for value in sums)
        return Work(
            processes * self.tokens, processes * self.squared_tokens, supervised, patches, squared, self.runs_tower
        )

    @property
    def most_patches(self) -> int:
        """Number of patches of the largest batch."""
        return 0 if self._most_patches is None else int(self._most_patches)


@dataclass(frozen=True)
class Duration:
    """How long a training took.

    Attributes:
        seconds: Duration of the part that this process ran.
        all_seconds: Duration of all parts, of a training that was continued.
        share: Share of the steps that this process ran.
    """

    seconds: float
    all_seconds: float
    share: float


@dataclass(frozen=True)
class Efficiency:
    """What a training took, and what `plan`'s formulas say of it.

    Attributes:
        metrics: Measured values by name.
        planned: Values of the formulas by the names of the metrics.
    """

    metrics: dict[str, float]
    planned: dict[str, float]


def measure_efficiency(
    arguments: Arguments,
    base: Path,
    generation: Generation,
    model: nn.Module,
    counter: WorkCounter,
    duration: Duration,
    gpu: str,
) -> Efficiency:
    """Measure a training that has ended.

    Args:
        arguments: Its flags.
        base: Folder of the base model.
        generation: Generation of the base model.
        model: The trained model.
        counter: What this process has computed.
        duration: How long it took.
        gpu: Name of the GPU; empty without one.
    """
    processes = arguments.training.world_size
    metrics = {"tokens/s": processes * counter.tokens / duration.seconds} if counter.tokens else {}
    if gpu:
        metrics["gpu_hours"] = processes * duration.all_seconds / _SECONDS_PER_HOUR
    if not gpu or not counter.tokens:
        return Efficiency(metrics, {})
    sizes = read_model(base, adapter_targets(vars(arguments.lora)))
    trained = trained_by_part(model, generation)
    recipe = _recipe(arguments, sizes, trained)
    checkpointing = bool(arguments.training.activation_checkpointing)
    memory = estimate_memory(sizes, recipe, counter.largest_batch, counter.most_patches, checkpointing)
    planned = {"peak_memory_mb": memory[_strategy(arguments)] / 1e6}
    if rate := peak_flops(gpu):
        work = counter.work(processes)
        needed = needed_flops(sizes, trained, work)
        patches = work.patches if work.runs_tower else 0.0
        flops = count_flops(sizes, recipe, work.tokens, work.squared_tokens, patches, checkpointing)
        hours = expected_hours(sizes, flops, rate)
        metrics["mfu"] = needed / (duration.seconds * processes * rate)
        planned["mfu"] = needed / (hours * _SECONDS_PER_HOUR * rate)
        planned["tokens/s"] = work.tokens / (hours * _SECONDS_PER_HOUR / processes)
        planned["gpu_hours"] = hours / duration.share
    return Efficiency(metrics, planned)


def trained_by_part(model: nn.Module, generation: Generation) -> dict[str, int]:
    """Number of trained parameters of each part, adapters included."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name.removeprefix(PEFT_PREFIX), generation)
            counts[part] = counts.get(part, 0) + parameter_size(parameter)
    return counts


def _recipe(arguments: Arguments, sizes: Model, trained: Mapping[str, int]) -> Recipe:
    """The settings of the training that its cost depends on."""
    training = arguments.training
    whole = tuple(part for part in ("embeddings", "merger") if trained.get(part, 0) >= sizes.parameters[part])
    return Recipe(
        devices=training.world_size,
        batch_size=training.train_batch_size,
        epochs=training.num_train_epochs,
        use_lora=training.use_lora,
        tune_vision=trained.get("vision", 0) >= sizes.parameters["vision"] - sizes.unused,
        tune_llm=training.tune_llm,
        lora_r=arguments.lora.lora_r,
        accumulation_steps=training.gradient_accumulation_steps,
        whole=whole,
        whole_in_4_bits=whole,
        use_dora=arguments.lora.use_dora,
    )


def _strategy(arguments: Arguments) -> str:
    """The training's strategy by its name in an estimate of memory."""
    training = arguments.training
    if arguments.lora.q_lora:
        return "QLoRA"
    if training.fsdp or is_deepspeed_zero3_enabled():
        return "ZeRO-3"
    return "ZeRO-2" if training.deepspeed else "DDP" if training.world_size > 1 else "single GPU"
