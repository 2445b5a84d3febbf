"""Write the merged weights a block of rows at a time, and measure on the way how far they moved."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import ADAPTER_CONFIG
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.progress import progress

from .names import read_names
from .report import Memory, Moved
from .tensor_layout import Plan, make_plan
from .update import Update, Updates, read_adapter, read_full_fine_tune
from .weights import Planned, as_bytes, read_headers, write_files, write_index

FIXED_MEMORY = 200 * 10**6
"""Bytes that streaming may take beside its baseline and four times the largest tensor."""


@dataclass(frozen=True)
class Streamed:
    """What streaming did.

    Attributes:
        plan: of the files.
        bytes: of all tensors.
        moved: by part of the model.
        changed: relative change of each tensor that differs from the base.
        memory: anonymous memory; None where the system does not tell.
        seconds: spent.
    """

    plan: Plan
    bytes: int
    moved: dict[str, Moved]
    changed: dict[str, float]
    memory: Memory | None
    seconds: float


def stream(base: Path, adapter: Path, folder: Path) -> Streamed:
    """Write the merged weights, and nothing else, into a folder.

    Raises:
        UserError: adapter and base do not belong together, or a merged value is not a finite number.
    """
    started, baseline = time.monotonic(), anonymous_memory()
    files = read_headers(base)
    names = read_names(base, files)
    updates = _read_updates(adapter)
    plan = make_plan(base, files, names, updates)
    size = sum(tensor.source.size for tensor in plan.tensors)
    movements = {tensor.module: _Movement() for tensor in plan.tensors}
    peak = baseline

    with progress("merge", size, "B", unit_scale=True) as bar, _one_thread():

        def blocks(tensor: Planned) -> Iterator[memoryview] | None:
            update = updates.by_tensor.get(tensor.module)
            return None if update is None else merged(tensor, update)

        def merged(tensor: Planned, update: Update) -> Iterator[memoryview]:
            nonlocal peak
            movement = movements[tensor.module]
            for number, (before, after) in enumerate(update.blocks(tensor.source)):
                movement.add(before, after)
                if number == 0:
                    peak = max(peak, anonymous_memory())
                yield as_bytes(after)
            movement.check(tensor)

        write_files(folder, plan.files, blocks, bar.update)
    write_index(base, folder, plan.files)
    largest = max(tensor.source.size for tensor in plan.tensors)
    return Streamed(
        plan=plan,
        bytes=size,
        moved=_by_part(movements, names.generation),
        changed={name: movement.relative for name, movement in movements.items() if movement.difference},
        memory=Memory(baseline=baseline, peak=peak, largest_tensor=largest, bound=baseline + 4 * largest + FIXED_MEMORY)
        if baseline
        else None,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let each operation run on one core.

    A block is small: meeting the other cores after each operation on it costs more than they save, on a busy machine
    many times as much.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def anonymous_memory() -> int:
    """This process's anonymous memory in bytes (not what is mapped from files); 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


@dataclass
class _Movement:
    """Sums of squares of a tensor's base values and of their change."""

    base: float = 0.0
    difference: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        values = before.float().reshape(-1)
        change = after.to(torch.float32, copy=True).reshape(-1).sub_(values)
        self.base += float(values @ values)
        self.difference += float(change @ change)

    def check(self, tensor: Planned) -> None:
        if not math.isfinite(self.difference):
            raise UserError(
                f"{tensor.name}: merged values are not finite in {tensor.source.dtype}; the training diverged, lower "
                "the learning rate."
            )

    @property
    def relative(self) -> float:
        # Of a tensor that was zero all is new.
        return math.sqrt(self.difference / self.base) if self.base else float(self.difference > 0)


@dataclass
class _Part:
    tensors: int = 0
    changed: int = 0
    movement: _Movement = field(default_factory=_Movement)


def _by_part(movements: dict[str, _Movement], generation: Generation) -> dict[str, Moved]:
    """Movements by part of the model; the embeddings are a part of their own within the language model."""
    prefixes = {
        generation.embed_tokens: "embed_tokens",
        generation.language_model: "language_model",
        generation.vision_tower: "vision_tower",
        generation.merger: "merger",
    }
    parts: dict[str, _Part] = defaultdict(_Part)
    for name, movement in movements.items():
        owners = [prefix for prefix in prefixes if name.startswith(f"{prefix}.")]
        part = parts[prefixes[max(owners, key=len)] if owners else "head"]
        part.tensors += 1
        if movement.difference:
            part.changed += 1
            part.movement.base += movement.base
            part.movement.difference += movement.difference
    return {
        name: Moved(tensors=part.tensors, changed=part.changed, relative=part.movement.relative if part.changed else 0)
        for name, part in parts.items()
    }


def _read_updates(adapter: Path) -> Updates:
    if (adapter / ADAPTER_CONFIG).is_file():
        return read_adapter(adapter)
    return read_full_fine_tune(adapter, read_names(adapter, read_headers(adapter)).modules)
