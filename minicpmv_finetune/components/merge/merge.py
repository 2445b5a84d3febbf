"""Merge an adapter into its base model, and publish the result only after a parity check.

Tensors are streamed: read, changed and written a block of rows at a time, so that a model of any size needs the
memory of a few blocks. The result is a drop-in replacement for the base: the same files, names and types, and a copy
of every other file of the base. The parity check, a process of its own, then compares the finished folder with base
and adapter on real samples; until the check passes, the folder keeps a hidden name.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError
from minicpmv_finetune.fork_server import run_program
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.minicpmv.adapters import ADAPTER_CONFIG
from minicpmv_finetune.minicpmv.checkpoint import copy_non_weight_files, fingerprint
from minicpmv_finetune.minicpmv.generations import Generation, detect_generation, write_max_slices
from minicpmv_finetune.outputs import check_folder, claimed_folder
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.reports.training_record import RECORD_FILE, TrainingRecord, read_record
from minicpmv_finetune.shards.format import read_manifest
from minicpmv_finetune.tracking.step_runs import step_run

from .card import write_card
from .report import MergeReport, ParityReport, markdown
from .streaming import StreamingResult, stream
from .tensor_layout import edit_config

__all__ = ["MergeReport", "MergeSettings", "describe_replaced", "markdown", "merge"]

PARITY_CHECK = "minicpmv_finetune.components.merge.parity_check"


@dataclass(frozen=True)
class MergeSettings:
    """Settings of the parity check.

    Attributes:
        parity_rows: Number of samples on which merged and unmerged logits are compared and answers are generated.
    """

    parity_rows: int = 4


def merge(
    base_model_uri: str, adapter: Path, shards: Path, model: Path, report_file: Path, settings: MergeSettings
) -> MergeReport:
    """Merge the output of the train step into its base model.

    Args:
        base_model_uri: Checkpoint that was trained on; a path, `s3://`, `hf://` or a hub id.
        adapter: Output of the train step: a PEFT adapter, or a full fine-tune, which takes the same parity check.
        shards: Prepared samples; the parity check uses a few of them.
        model: Receives a checkpoint folder that is a drop-in replacement for the base.
        report_file: Receives the report as JSON, also when the parity check fails.
        settings: Settings of the parity check.

    Returns:
        The report.

    Raises:
        UserError: Adapter and base do not belong together, the adapter contains something that cannot be merged, the
            training changed nothing, or the merged model's logits differ from those of base and adapter.
        RetryableError: Storage does not answer, or the parity check's process was killed.
    """
    inputs = {"--base-model": base_model_uri, "--adapter": str(adapter), "--shards": str(shards)}
    check_folder(model, "merge", inputs)
    parts = _open_parts(base_model_uri, adapter, shards)
    with (
        claimed_folder(model, "merge", inputs, [report_file]) as output,
        step_run("merge") as run,
        output.assembled() as staging,
    ):
        run.log_parameters({**_parameters(parts), "parity_rows": settings.parity_rows})
        streamed = stream(parts.base, adapter, staging)
        report = _report_streaming(streamed, parts)
        _write_report(report_file, report)
        _require_change(streamed, adapter)
        _add_other_files(staging, parts, streamed, report)
        started = time.monotonic()
        check = _run_parity_check(parts.base, adapter, staging, shards, settings.parity_rows)
        # "gate" is what 0.1.0 called the parity check, and its key in the file.
        seconds = {**report.seconds, "gate": time.monotonic() - started}
        report = report.model_copy(update={"parity_check": check, "seconds": seconds})
        _write_report(report_file, report)
        run.log_metrics(report.metrics)
        run.log_report(report_file, "merge.json")
        if check.failure is not None:
            raise UserError(check.failure)
    tensors = sum(part.tensors for part in report.moved.values())
    report_outcome(
        f"{len(report.changed)} of {tensors} tensors changed; logits within {check.parity.largest_difference:.0e} of "
        "base + adapter"
    )
    return report


def describe_replaced(report_uri: str, report: MergeReport) -> str:
    """What an earlier model in a store was made from, if a new one replaces it.

    Args:
        report_uri: URI of the earlier model's report.
        report: Report of the new model.

    Returns:
        Base model and data; empty if there is no earlier model, or the new one is the same.

    Raises:
        UserError: Access is denied.
        RetryableError: The store does not answer.
    """
    if report_uri.rpartition("/")[2] not in storage.list_files(storage.parent(report_uri)):
        return ""
    try:
        earlier = MergeReport.model_validate_json(storage.read_bytes(report_uri))
    except ValidationError:
        return "another version of this program"
    decisive = {"base_fingerprint", "data_fingerprint", "changed"}
    if earlier.model_dump(include=decisive) == report.model_dump(include=decisive):
        return ""
    return f"--base-model {earlier.base_model} and the data {earlier.data_fingerprint[:12]}"


@dataclass(frozen=True)
class _Parts:
    """What is merged.

    Attributes:
        base_uri: Address of the base model.
        base: Local folder of the base model.
        fingerprint: Fingerprint of the base model.
        generation: Generation of the base model.
        adapter: Output of the train step.
        record: Record of the training.
    """

    base_uri: str
    base: Path
    fingerprint: str
    generation: Generation
    adapter: Path
    record: TrainingRecord


def _open_parts(base_model_uri: str, adapter: Path, shards: Path) -> _Parts:
    """Fetch the base model, and make sure that adapter and shards were made for it.

    Raises:
        UserError: They were not, or one of them is missing.
    """
    record = read_record(adapter)
    base = storage.fetch(base_model_uri)
    generation = detect_generation(base)
    for place, version in ((adapter, record.generation), (shards, read_manifest(shards).generation)):
        _require_generation(place, version, base_model_uri, generation)
    parts = _Parts(base_model_uri, base, fingerprint(base), generation, adapter, record)
    record.require_base(adapter, base_model_uri, parts.fingerprint)
    return parts


def _parameters(parts: _Parts) -> dict[str, str]:
    """What is merged, for MLflow."""
    return {
        "base_model": parts.base_uri,
        "generation": parts.record.generation,
        "base_fingerprint": parts.fingerprint,
        "data_fingerprint": parts.record.data_fingerprint,
        "git_commit": git_commit(),
    }


def _require_change(streamed: StreamingResult, adapter: Path) -> None:
    if not streamed.changed and streamed.layout.layers is None:
        raise UserError(
            f"{adapter}: the merged model would equal the base model in every tensor, because the training changed "
            "nothing or less than the weights' type can store; raise the learning rate or the number of steps."
        )


def _require_generation(place: Path, version: str, base_model_uri: str, generation: Generation) -> None:
    if version != generation.version:
        raise UserError(
            f"{place}: made for MiniCPM-V {version}, but {base_model_uri} is {generation.version}; give the base model "
            "that was trained on."
        )


def _report_streaming(streamed: StreamingResult, parts: _Parts) -> MergeReport:
    return MergeReport(
        base_model=parts.base_uri,
        base_fingerprint=parts.fingerprint,
        generation=parts.record.generation,
        data_fingerprint=parts.record.data_fingerprint,
        kind="adapter" if (parts.adapter / ADAPTER_CONFIG).is_file() else "full",
        bytes=streamed.bytes,
        moved=streamed.moved,
        changed=streamed.changed,
        untied=streamed.layout.untied,
        memory=streamed.memory,
        seconds={"streaming": streamed.seconds},
    )


def _add_other_files(folder: Path, parts: _Parts, streamed: StreamingResult, report: MergeReport) -> None:
    """Add the files that are not weights: the base's, adapted to the merged weights, the card and the record."""
    copy_non_weight_files(parts.base, folder)
    edit_config(folder, streamed.layout)
    write_max_slices(folder, parts.record.max_slice_nums)
    write_card(folder, parts.generation, report, parts.record)
    shutil.copyfile(parts.adapter / RECORD_FILE, folder / RECORD_FILE)


def _write_report(path: Path, report: MergeReport) -> None:
    storage.write_bytes(str(path), (report.model_dump_json(indent=1) + "\n").encode())


def _run_parity_check(base: Path, adapter: Path, model: Path, shards: Path, rows: int) -> ParityReport:
    """Check the staged folder in a new process."""
    report = model.with_name(f"{model.name}.parity.json")
    arguments = [str(base), str(adapter), str(model), str(shards), str(report), str(rows)]
    try:
        code = run_program(PARITY_CHECK, arguments)
        if code == 0:
            return ParityReport.model_validate_json(report.read_text())
        if code == USER_ERROR_EXIT and report.is_file():
            raise UserError(report.read_text())
    finally:
        report.unlink(missing_ok=True)
    if code < 0:
        raise RetryableError(
            f"The parity check's process was ended by signal {-code}; it holds the model in float32, so "
            "give the step four bytes of memory for each parameter."
        )
    raise RuntimeError(f"the parity check ended with exit code {code}; its traceback is above")
