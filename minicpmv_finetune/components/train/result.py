"""Writes the result of a training: an adapter or a whole checkpoint, with the training's record and report."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    double_rank,
    make_readable_by_older_versions,
    save_adapter,
    subtract_first_values,
)
from minicpmv_finetune.minicpmv.checkpoint import copy_non_weight_files
from minicpmv_finetune.minicpmv.generations import write_max_slices
from minicpmv_finetune.outputs import OutputFolder
from minicpmv_finetune.reports.training_record import RECORD_FILE, TrainingRecord
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.step_runs import StepRun

from .initial_adapter import InitialAdapter
from .report import write_report
from .trainer import MiniCPMVTrainer

REPORT_FILE = "training.html"


def save_result(
    trainer: MiniCPMVTrainer,
    base: Path,
    output: OutputFolder | None,
    record: TrainingRecord,
    command: Sequence[str],
    run: StepRun,
    checkpoints: Sequence[str] = (),
    initial: InitialAdapter | None = None,
) -> None:
    """Write the result completely or not at all; every process takes part, and the first one writes.

    Args:
        trainer: The trainer after its training.
        base: Local folder of the base model.
        output: The claimed folder that receives the result; None in all processes but the first.
        record: Record of the training.
        command: Flags of the training script, for the report.
        run: MLflow run that receives the record and the report.
        checkpoints: Addresses of the checkpoints whose adapters are kept in the result, to merge one of them instead.
        initial: First values of adapters that began with a part of the base's weights.

    Raises:
        UserError: The training changed no adapter.
    """
    weights = _rounded(trainer.gathered_weights(), bool(trainer.args.bf16), record.use_lora)
    if output is None:
        return
    with output.assembled() as folder:
        if record.use_lora:
            _save_adapter(trainer, weights, folder, record, initial)
        else:
            _save_checkpoint(trainer, weights, folder, record, base)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")
        for address in checkpoints:
            _keep_adapter(address, folder, trainer, initial)
        write_report(folder / REPORT_FILE, record, command)
        run.log_file(str(folder / REPORT_FILE))
        run.log_file(str(folder / RECORD_FILE))


def _rounded(weights: dict[str, torch.Tensor], is_bf16: bool, use_lora: bool) -> dict[str, torch.Tensor]:
    """What was trained whole, in the type that the training computed in; adapters stay float32, as PEFT has them."""
    if not is_bf16:
        return weights
    return {
        name: value.bfloat16() if value.is_floating_point() and (not use_lora or ".modules_to_save." in name) else value
        for name, value in weights.items()
    }


def _save_adapter(
    trainer: MiniCPMVTrainer,
    weights: dict[str, torch.Tensor],
    folder: Path,
    record: TrainingRecord,
    initial: InitialAdapter | None,
) -> None:
    _require_changed_adapter(weights, initial or {})
    model = trainer.accelerator.unwrap_model(trainer.model)
    address, revision = _base_address(record.base_model)
    for config in model.peft_config.values():
        config.revision = revision
    save_adapter(model, weights, folder, address)
    make_readable_by_older_versions(folder)
    if initial:
        subtract_first_values(model, initial, folder / ADAPTER_WEIGHTS)
        double_rank(folder)


def _keep_adapter(checkpoint: str, result: Path, trainer: MiniCPMVTrainer, initial: InitialAdapter | None) -> None:
    """Keep a checkpoint's adapter as an adapter folder of its own inside the result."""
    folder = result / checkpoint.rpartition("/")[2]
    try:
        weights = storage.fetch(storage.join(checkpoint, ADAPTER_WEIGHTS))
    except UserError:
        print_sentence(f"{folder.name} has no adapter file, so it is not kept in the result.")
        return
    folder.mkdir()
    shutil.copyfile(weights, folder / ADAPTER_WEIGHTS)
    if initial:
        subtract_first_values(trainer.accelerator.unwrap_model(trainer.model), initial, folder / ADAPTER_WEIGHTS)
    for name in (ADAPTER_CONFIG, RECORD_FILE):  # the same for all checkpoints of a training
        shutil.copyfile(result / name, folder / name)


def _base_address(base_model: str) -> tuple[str, str | None]:
    """Where PEFT can find the base model: its name and revision in the hub, an absolute path, or its address."""
    if reference := storage.hub_reference(base_model):
        return reference
    is_address = storage.is_object_uri(base_model)
    return (base_model if is_address else str(Path(base_model).expanduser().resolve())), None


def _save_checkpoint(
    trainer: MiniCPMVTrainer, weights: dict[str, torch.Tensor], folder: Path, record: TrainingRecord, base: Path
) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    copy_non_weight_files(base, folder)
    if is_deepspeed_zero3_enabled():
        # Loading under ZeRO-3 records every possible renaming of weights for the architecture, whether it was used or
        # not; saving would undo all of them.
        model._weight_conversions = None
    model.save_pretrained(folder, state_dict=weights)
    write_max_slices(folder, record.max_slice_nums)


def _require_changed_adapter(weights: Mapping[str, torch.Tensor], initial: InitialAdapter) -> None:
    """Fail if no B has changed: a LoRA update is B·A, and B is zero at the start of a training, or has first values."""
    updates = [name for name in weights if "lora_B" in name or "lora_embedding_B" in name]
    unchanged = [name for name in updates if not _has_changed(weights[name], initial.get(_name_in_file(name)))]
    if updates and len(unchanged) == len(updates):
        state = "as it began" if initial else "at zero"
        raise UserError(f"Training left every adapter {state}; raise --learning_rate or the number of steps.")
    if unchanged:
        state = "as they began" if initial else "still zero"
        print_sentence(
            f"{len(unchanged)} of {len(updates)} adapters are {state}, such as {unchanged[0]}: no sample of this "
            "training has used their layers.",
        )


def _has_changed(value: torch.Tensor, first: torch.Tensor | None) -> bool:
    return bool(value.any()) if first is None else not torch.equal(value.cpu(), first)


def _name_in_file(name: str) -> str:
    """The name that an adapter's file gives to a tensor of the model."""
    return re.sub(r"\.default(?=\.weight$|$)", "", name)
