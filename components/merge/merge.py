"""Merge an adapter into its base model, and let the result be seen only once it is proven.

Tensors are streamed: read, changed and written a block of rows at a time, so that a model of any size needs the
memory of a few blocks. What comes out is a drop-in for the base: the same files, names and types, every other
file of the base beside them. The gate then takes the finished folder, in a process of its own, and compares it with
base and adapter on real samples; until it agrees the folder keeps its hidden name.
"""

import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import storage
from ..errors import USER_ERROR_EXIT, RetryableError, UserError
from ..minicpmv.checkpoint import ADAPTER_CONFIG, copy_other_files
from ..minicpmv.generations import Generation, generation_of, write_max_slices
from ..progress import conclude, progress
from ..shards import read_manifest
from ..tracking import step_run
from .card import write_card
from .names import read_names
from .plan import Plan, edit_config, make_plan
from .report import GateReport, Memory, MergeReport, Moved, markdown
from .update import Update, Updates, read_adapter, read_full_fine_tune
from .weights import Planned, as_bytes, raw_blocks, read_headers, write_file, write_index

__all__ = ["MergeReport", "MergeSettings", "markdown", "merge", "stream"]

GATE = "minicpmv_finetune.components.merge.gate"
RECORD_FILE = "training.json"
FIXED_MEMORY = 200 * 10**6
"""Bytes that streaming may take beside its baseline and four times the largest tensor."""


@dataclass(frozen=True)
class MergeSettings:
    """How thoroughly the merged model is checked.

    Attributes:
        parity_rows: number of samples on which merged and unmerged logits are compared, and which are answered.
    """

    parity_rows: int = 4


def merge(
    base_model_uri: str, adapter: Path, shards: Path, model: Path, report_file: Path, settings: MergeSettings
) -> MergeReport:
    """Merge what the train step left into its base model.

    Args:
        base_model_uri: checkpoint that was trained on; a path, `s3://`, `hf://` or a hub id.
        adapter: the train step's result: a PEFT adapter, or a full fine-tune, which passes the same gate.
        shards: prepared samples; a few of them are the gate's.
        model: receives a checkpoint folder that is a drop-in for the base.
        report_file: receives the report as JSON, also when the gate refuses the model.
        settings: see there.

    Returns:
        The report.

    Raises:
        UserError: adapter and base do not belong together, the adapter holds what cannot be merged, nothing was
            learnt, or the merged model answers otherwise than base and adapter do.
        RetryableError: storage does not answer, or the gate's process was killed.
    """
    record = _read_record(adapter)
    base = storage.fetch(base_model_uri)
    generation = generation_of(base)
    manifest = read_manifest(shards)
    for what, version in ((adapter, record["generation"]), (shards, manifest.generation)):
        if version != generation.version:
            raise UserError(
                f"{what}: made for MiniCPM-V {version}, but {base_model_uri} is {generation.version}; give the base "
                "model that was trained on."
            )
    with step_run("merge") as run, storage.staged_folder(model) as staging:
        run.log_parameters({"base_model": base_model_uri, "parity_rows": settings.parity_rows})
        streamed = stream(base, adapter, staging)
        report = MergeReport(
            base_model=base_model_uri,
            generation=generation.version,
            data_fingerprint=record["data_fingerprint"],
            kind="adapter" if _is_adapter(adapter) else "full",
            bytes=streamed.bytes,
            moved=streamed.moved,
            changed=streamed.changed,
            untied=streamed.plan.untied,
            memory=streamed.memory,
            seconds={"streaming": streamed.seconds},
        )
        _write_report(report_file, report)
        if not streamed.changed and streamed.plan.layers is None:
            raise UserError(
                f"{adapter}: the merged model would equal the base model in every tensor, so nothing was learnt that "
                "the weights' type can hold; raise the learning rate or the number of steps."
            )
        copy_other_files(base, staging)
        edit_config(staging, streamed.plan)
        write_max_slices(staging, record["max_slice_nums"])
        write_card(staging, generation, report, record)
        started = time.monotonic()
        gate = _run_gate(base, adapter, staging, shards, settings.parity_rows)
        seconds = {**report.seconds, "gate": time.monotonic() - started}
        report = report.model_copy(update={"gate": gate, "seconds": seconds})
        _write_report(report_file, report)
        run.log_metrics(report.metrics)
        run.log_file(str(report_file))
        if gate.failure is not None:
            raise UserError(gate.failure)
    tensors = sum(part.tensors for part in report.moved.values())
    conclude(
        f"{len(report.changed)} of {tensors} tensors changed; logits differ by at most "
        f"{gate.parity.largest_difference:.1e} from base and adapter"
    )
    return report


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

    with progress("merge", size, "B", unit_scale=True) as bar:

        def blocks(tensor: Planned) -> Iterator[memoryview]:
            nonlocal peak
            update = updates.by_tensor.get(tensor.module)
            for block in raw_blocks(tensor.source) if update is None else _merged(tensor, update):
                yield block
                bar.update(len(block))
            peak = max(peak, anonymous_memory())

        def _merged(tensor: Planned, update: Update) -> Iterator[memoryview]:
            nonlocal peak
            for before, after in update.blocks(tensor.source):
                movements[tensor.module].add(before, after)
                peak = max(peak, anonymous_memory())
                yield as_bytes(after)
            movements[tensor.module].check(tensor)

        for name, metadata, tensors in plan.files:
            write_file(folder / name, metadata, tensors, blocks)
    write_index(base, folder, {name: tensors for name, _, tensors in plan.files})
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
        change = after.float().reshape(-1) - values
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


def _read_record(adapter: Path) -> dict[str, Any]:
    path = adapter / RECORD_FILE
    if not path.is_file():
        raise UserError(f"{adapter}: no {RECORD_FILE} here; give the train step's result.")
    return dict(json.loads(path.read_text()))


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _read_updates(adapter: Path) -> Updates:
    if _is_adapter(adapter):
        return read_adapter(adapter)
    return read_full_fine_tune(adapter, read_names(adapter, read_headers(adapter)).modules)


def _write_report(path: Path, report: MergeReport) -> None:
    storage.write_bytes(str(path), (report.model_dump_json(indent=1) + "\n").encode())


def _run_gate(base: Path, adapter: Path, model: Path, shards: Path, rows: int) -> GateReport:
    """Let a fresh process judge the staged folder."""
    report = model.with_name(f"{model.name}.gate.json")
    arguments = [str(base), str(adapter), str(model), str(shards), str(report), str(rows)]
    try:
        done = subprocess.run([sys.executable, "-m", GATE, *arguments], check=False)  # noqa: S603
        if done.returncode == 0:
            return GateReport.model_validate_json(report.read_text())
    finally:
        report.unlink(missing_ok=True)
    if done.returncode == USER_ERROR_EXIT:
        raise UserError("The gate could not load the merged model; its sentence is above.")
    if done.returncode < 0:
        raise RetryableError(
            f"The gate's process was ended by signal {-done.returncode}; it holds the model in float32, so give the "
            "step four bytes of memory for each parameter."
        )
    raise RuntimeError(f"the gate ended with exit code {done.returncode}; its traceback is above")
