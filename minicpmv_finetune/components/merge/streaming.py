"""Write the merged weights a block of rows at a time, and measure how far they differ from the base's."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import ADAPTER_CONFIG
from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.progress import progress

from .names import read_tensor_names
from .report import PartChange, StreamingMemory
from .tensor_layout import TensorLayout, lay_out_tensors
from .update import Update, Updates, read_adapter, read_full_fine_tune
from .weights import OutputTensor, as_bytes, read_headers, write_files, write_index

FIXED_MEMORY = 200 * 10**6
"""Bytes that streaming may use in addition to its baseline and four times the largest tensor."""


@dataclass(frozen=True)
class StreamingResult:
    """Result of streaming.

    Attributes:
        layout: Files and tensors that were written.
        bytes: Size of all tensors.
        moved: Change of each part of the model, by the part's name.
        changed: Relative change of each tensor that differs from the base.
        memory: Anonymous memory; None where the operating system does not report it.
        seconds: Duration.
    """

    layout: TensorLayout
    bytes: int
    moved: dict[str, PartChange]
    changed: dict[str, float]
    memory: StreamingMemory | None
    seconds: float


def stream(base: Path, adapter: Path, folder: Path) -> StreamingResult:
    """Write the merged weights, and no other files, to a folder.

    Raises:
        UserError: Adapter and base do not belong together, or a merged value is not a finite number.
    """
    started, baseline = time.monotonic(), anonymous_memory()
    files = read_headers(base)
    names = read_tensor_names(base, files)
    updates = _read_updates(adapter)
    layout = lay_out_tensors(base, files, names, updates)
    size = sum(tensor.source.size for tensor in layout.tensors)
    changes = {tensor.module: _Change() for tensor in layout.tensors}
    peak = baseline

    with progress("merge", size, "B", unit_scale=True) as bar, _one_thread():

        def blocks(tensor: OutputTensor) -> Iterator[memoryview] | None:
            update = updates.by_tensor.get(tensor.module)
            return None if update is None else merged_blocks(tensor, update)

        def merged_blocks(tensor: OutputTensor, update: Update) -> Iterator[memoryview]:
            nonlocal peak
            change = changes[tensor.module]
            for number, (before, after) in enumerate(update.blocks(tensor.source)):
                change.add(before, after)
                if number == 0:
                    peak = max(peak, anonymous_memory())
                yield as_bytes(after)
            change.require_finite(tensor)

        write_files(folder, layout.files, blocks, bar.update)
    write_index(base, folder, layout.files)
    largest = max(tensor.source.size for tensor in layout.tensors)
    bound = baseline + 4 * largest + FIXED_MEMORY
    memory = StreamingMemory(baseline=baseline, peak=peak, largest_tensor=largest, bound=bound)
    return StreamingResult(
        layout=layout,
        bytes=size,
        moved=_by_part(changes, names.generation),
        changed={name: change.relative for name, change in changes.items() if change.difference},
        memory=memory if baseline else None,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run each torch operation on one core.

    A block is small: synchronizing with other cores after each operation costs more than they save, on a busy machine
    many times more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def anonymous_memory() -> int:
    """Anonymous memory of this process in bytes, without mapped files; 0 where the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


@dataclass
class _Change:
    """Sums of squares of a tensor's base values and of their changes."""

    base: float = 0.0
    difference: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        values = before.float().reshape(-1)
        change = after.to(torch.float32, copy=True).reshape(-1).sub_(values)
        self.base += float(values @ values)
        self.difference += float(change @ change)

    def require_finite(self, tensor: OutputTensor) -> None:
        if not math.isfinite(self.difference):
            raise UserError(
                f"{tensor.name}: merged values are not finite in {tensor.source.dtype}, so the training diverged; "
                "lower the learning rate."
            )

    @property
    def relative(self) -> float:
        # A tensor of zeros that has any change is completely new.
        return math.sqrt(self.difference / self.base) if self.base else float(self.difference > 0)


@dataclass
class _PartSum:
    tensors: int = 0
    changed: int = 0
    change: _Change = field(default_factory=_Change)


def _by_part(changes: dict[str, _Change], generation: Generation) -> dict[str, PartChange]:
    """Sum up changes by part of the model; the language model's embeddings are a separate part."""
    prefixes = {
        generation.embed_tokens: "embed_tokens",
        generation.language_model: "language_model",
        generation.vision_tower: "vision_tower",
        generation.merger: "merger",
    }
    parts: dict[str, _PartSum] = defaultdict(_PartSum)
    for name, change in changes.items():
        matches = [prefix for prefix in prefixes if name.startswith(f"{prefix}.")]
        part = parts[prefixes[max(matches, key=len)] if matches else "head"]
        part.tensors += 1
        if change.difference:
            part.changed += 1
            part.change.base += change.base
            part.change.difference += change.difference
    return {
        name: PartChange(
            tensors=part.tensors, changed=part.changed, relative=part.change.relative if part.changed else 0
        )
        for name, part in parts.items()
    }


def _read_updates(adapter: Path) -> Updates:
    if (adapter / ADAPTER_CONFIG).is_file():
        return read_adapter(adapter)
    return read_full_fine_tune(adapter, read_tensor_names(adapter, read_headers(adapter)).modules)
