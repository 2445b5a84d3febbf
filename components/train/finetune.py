"""The training script that torchrun starts, one process a device.

    torchrun --nproc_per_node 2 -m minicpmv_finetune.components.train.finetune --data_path SHARDS …

It takes the flags of OpenBMB's published finetune.py, reads shards, trains with transformers' Trainer and PEFT, and
leaves a PEFT adapter (or, for a full fine-tune, a whole checkpoint) in `--output_dir`, with `training.json` beside it:
what was trained, on what, and how the loss went.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers import TrainingArguments as TransformersArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import storage
from ..errors import RetryableError, UserError, end_process
from ..minicpmv.batch import collate
from ..minicpmv.checkpoint import copy_other_files, load_model
from ..minicpmv.generations import write_max_slices
from ..minicpmv.row import Row
from ..progress import conclude, progress
from ..samples import Split
from ..shards import Manifest, ShardReader, read_manifest, verify_shards
from ..tracking import StepRun, open_step_run
from ..training_record import RECORD_FILE, TrainingRecord
from .arguments import Arguments, parse
from .train import SENTENCE_VARIABLE
from .trainable import count_parameters, make_trainable


def main(argv: Sequence[str]) -> None:
    """Train as the flags say; exits 2 with one sentence on a user's mistake."""
    try:
        finetune(parse(argv, announce=_say))
    except (UserError, RetryableError) as error:
        if sentence := os.environ.get(SENTENCE_VARIABLE):
            Path(sentence).write_text(str(error))
            sys.exit(error.exit_code)
        end_process(error)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def finetune(arguments: Arguments) -> None:
    """Train, save, and leave a record; the story of the step, top to bottom."""
    training = arguments.training
    shards = storage.fetch(arguments.data.data_path, _path(training.cache_dir))
    manifest = read_manifest(shards)
    verify_shards(shards, manifest)
    base = storage.fetch(arguments.model.model_name_or_path, _path(training.cache_dir))
    model, generation = load_model(base, _compute_dtype(training))
    if generation.version != manifest.generation:
        raise UserError(
            f"{shards}: prepared for MiniCPM-V {manifest.generation}, but {arguments.model.model_name_or_path} is "
            f"{generation.version}; run preprocess with this base model."
        )
    model.config.use_cache = False
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.cuda.is_available()
    # Before the adapters' random start, which the Trainer's own seeding comes too late for.
    set_seed(training.seed)
    trained = make_trainable(model, generation, arguments)
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
        trained.enable_input_require_grads()
    trainable, total = count_parameters(trained)
    _say(
        f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.1%}), "
        f"on {manifest.rows('train'):,} samples"
    )

    is_first = training.process_index == 0
    run = open_step_run("train") if is_first else StepRun()
    run.log_parameters(_settings(arguments))
    run.log_metrics({"parameters/trainable": trainable, "parameters/total": total})
    watcher = _Watcher(run, manifest)
    trainer = Trainer(
        model=trained,
        args=training,
        train_dataset=_Rows(shards, "train"),
        eval_dataset=_Rows(shards, "eval") if manifest.rows("eval") else None,
        data_collator=lambda rows: collate(rows, manifest.pad_token_id, manifest.patch_size, padding_side="right"),
        callbacks=[watcher],
    )
    # Both print every log line; the watcher shows one bar.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    status = "FAILED"
    try:
        outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or None)
        if not math.isfinite(outcome.training_loss):
            raise UserError(f"The training loss is {outcome.training_loss}; lower --learning_rate.")
        trainer.accelerator.wait_for_everyone()
        if is_first:
            parameters = {"trainable": trainable, "total": total}
            _save(trainer, base, arguments, manifest, parameters, _final_figures(outcome.metrics), watcher.history)
            conclude(f"loss {watcher.last_loss:.4f}, {trainable:,} of {total:,} parameters trained")
        status = "FINISHED"
    finally:
        run.finish(status)


def _save(
    trainer: Trainer,
    base: Path,
    arguments: Arguments,
    manifest: Manifest,
    parameters: dict[str, int],
    metrics: dict[str, float],
    history: list[dict[str, float]],
) -> None:
    """Write the adapter or the whole model so that it is there complete or not at all."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with storage.staged_folder(Path(str(arguments.training.output_dir))) as folder:
        if arguments.training.use_lora:
            _check_adapter_moved(model)
            for config in model.peft_config.values():
                # The address the user gave, not the place it was downloaded to.
                config.base_model_name_or_path = arguments.model.model_name_or_path
            model.save_pretrained(folder)
        else:
            copy_other_files(base, folder)
            model.config.use_cache = True
            model.save_pretrained(folder)
            write_max_slices(folder, manifest.max_slice_nums)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        record = TrainingRecord(
            base_model=arguments.model.model_name_or_path,
            generation=manifest.generation,
            data_fingerprint=manifest.data_fingerprint,
            max_slice_nums=manifest.max_slice_nums,
            use_lora=arguments.training.use_lora,
            parameters=parameters,
            metrics=metrics,
            arguments=json.loads(json.dumps(_settings(arguments), default=str)),
            history=history,
        )
        (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")


def _final_figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a person wants to see at a glance, of what transformers measured."""
    names = {
        "train_loss": "loss",
        "train_samples_per_second": "samples/s",
        "train_runtime": "seconds",
        "epoch": "epochs",
    }
    return {name: float(metrics[key]) for key, name in names.items() if key in metrics}


def _check_adapter_moved(model: PreTrainedModel) -> None:
    """A LoRA update is B·A with B zero at first: if every B is still zero, nothing was learnt."""
    updates = [
        parameter for name, parameter in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name
    ]
    if updates and not any(bool(parameter.any()) for parameter in updates):
        raise UserError("Training left every adapter at zero; raise --learning_rate or the number of steps.")


class _Rows(Dataset[Row]):
    """One split's rows, opened anew in each worker process."""

    def __init__(self, shards: Path, split: Split) -> None:
        self.reader = ShardReader(shards, split)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> Row:
        row: Row = self.reader[position]
        return row


class _Watcher(TrainerCallback):
    """Shows one progress bar, keeps the curves, and sends them to MLflow."""

    def __init__(self, run: StepRun, manifest: Manifest) -> None:
        self.run = run
        self.mean_length = float(np.mean(manifest.lengths["train"]))
        self.history: list[dict[str, float]] = []
        self.bar: Any = None
        self.samples_per_step = 1

    @property
    def last_loss(self) -> float:
        """The latest training loss that was logged."""
        return next((figures["loss"] for figures in reversed(self.history) if "loss" in figures), math.nan)

    def on_train_begin(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.is_world_process_zero:
            self.bar = progress("train", state.max_steps * self.samples_per_step, " samples", unit_scale=True)

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.samples_per_step)

    def on_log(
        self,
        args: TransformersArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep and send the figures."""
        if not state.is_world_process_zero or not logs:
            return
        figures = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        self.history.append({"step": state.global_step, **figures})
        self.run.log_metrics({f"train/{name}": value for name, value in figures.items()}, state.global_step)
        if self.bar is not None and "loss" in figures:
            self.bar.set_postfix_str(f"loss {figures['loss']:.4f}", refresh=False)

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def _compute_dtype(training: TransformersArguments) -> torch.dtype | None:
    """bf16 and fp16 flags choose the frozen weights' type, as in the published script; else that of the file."""
    if training.fp16:
        return torch.float16
    return torch.bfloat16 if training.bf16 else None


def _settings(arguments: Arguments) -> dict[str, Any]:
    """What was asked for, without transformers' hundred defaults."""
    settings: dict[str, Any] = {}
    for group in (arguments.model, arguments.data, arguments.training, arguments.lora):
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            default = item.default if item.default is not dataclasses.MISSING else None
            own = not isinstance(group, TransformersArguments) or item.name in type(group).__annotations__
            if own or value != default:
                settings[item.name] = value
    settings.pop("hub_token", None)
    return settings


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
