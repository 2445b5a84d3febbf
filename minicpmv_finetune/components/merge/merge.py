"""Merge an adapter into its base model, and let the result be seen only once it is proven.

Tensors are streamed: read, changed and written a block of rows at a time, so that a model of any size needs the
memory of a few blocks. What comes out is a drop-in for the base: the same files, names and types, every other
file of the base beside them. The gate then takes the finished folder, in a process of its own, and compares it with
base and adapter on real samples; until it agrees the folder keeps its hidden name.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune import storage
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError
from minicpmv_finetune.minicpmv.checkpoint import ADAPTER_CONFIG, copy_non_weight_files, fingerprint
from minicpmv_finetune.minicpmv.generations import detect_generation, write_max_slices
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record
from minicpmv_finetune.shards.format import read_manifest
from minicpmv_finetune.tracking.step_runs import step_run

from .card import write_card
from .report import MergeReport, ParityReport, markdown
from .streaming import stream
from .tensor_layout import edit_config

__all__ = ["MergeReport", "MergeSettings", "markdown", "merge"]

GATE = "minicpmv_finetune.components.merge.parity_check"


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
    record = read_record(adapter)
    base = storage.fetch(base_model_uri)
    generation = detect_generation(base)
    manifest = read_manifest(shards)
    for what, version in ((adapter, record.generation), (shards, manifest.generation)):
        if version != generation.version:
            raise UserError(
                f"{what}: made for MiniCPM-V {version}, but {base_model_uri} is {generation.version}; give the base "
                "model that was trained on."
            )
    base_fingerprint = fingerprint(base)
    if record.base_fingerprint and record.base_fingerprint != base_fingerprint:
        raise UserError(
            f"{base_model_uri}: not the weights that {adapter} was trained on ({record.base_model}, fingerprint "
            f"{record.base_fingerprint:.12}, here {base_fingerprint:.12}); give that base model."
        )
    if model.resolve() in (base.resolve(), adapter.resolve()):
        raise UserError(f"{model}: the merged model would replace what it is made of; give another folder.")
    with step_run("merge") as run, storage.staged_folder(model) as staging:
        run.log_parameters({"base_model": base_model_uri, "parity_rows": settings.parity_rows})
        streamed = stream(base, adapter, staging)
        report = MergeReport(
            base_model=base_model_uri,
            base_fingerprint=base_fingerprint,
            generation=generation.version,
            data_fingerprint=record.data_fingerprint,
            kind="adapter" if (adapter / ADAPTER_CONFIG).is_file() else "full",
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
        copy_non_weight_files(base, staging)
        edit_config(staging, streamed.plan)
        write_max_slices(staging, record.max_slice_nums)
        write_card(staging, generation, report, record)
        shutil.copyfile(adapter / RECORD_FILE, staging / RECORD_FILE)
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
    report_outcome(
        f"{len(report.changed)} of {tensors} tensors changed; logits within {gate.parity.largest_difference:.0e} of "
        "base + adapter"
    )
    return report


def _write_report(path: Path, report: MergeReport) -> None:
    storage.write_bytes(str(path), (report.model_dump_json(indent=1) + "\n").encode())


def _run_gate(base: Path, adapter: Path, model: Path, shards: Path, rows: int) -> ParityReport:
    """Let a fresh process judge the staged folder."""
    report = model.with_name(f"{model.name}.gate.json")
    arguments = [str(base), str(adapter), str(model), str(shards), str(report), str(rows)]
    try:
        done = subprocess.run([sys.executable, "-m", GATE, *arguments], check=False)  # noqa: S603
        if done.returncode == 0:
            return ParityReport.model_validate_json(report.read_text())
        if done.returncode == USER_ERROR_EXIT and report.is_file():
            raise UserError(report.read_text())
    finally:
        report.unlink(missing_ok=True)
    if done.returncode < 0:
        raise RetryableError(
            f"The gate's process was ended by signal {-done.returncode}; it holds the model in float32, so give the "
            "step four bytes of memory for each parameter."
        )
    raise RuntimeError(f"the gate ended with exit code {done.returncode}; its traceback is above")
