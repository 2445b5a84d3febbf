"""The training script that torchrun starts, one process a device.

    torchrun --nproc_per_node 2 -m minicpmv_finetune.components.train.finetune --data_path SHARDS …

It takes the flags of OpenBMB's published finetune.py, reads shards, trains with transformers' Trainer and PEFT, and
leaves a PEFT adapter (or, for a full fine-tune, a whole checkpoint) in `--output_dir`, with `training.json` beside it:
what was trained, on what, and how the loss went. A run that was cut off goes on from its newest complete checkpoint.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers import TrainingArguments as TransformersArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction

from minicpmv_finetune import environment, storage
from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.errors import RetryableError, UserError, end_process, explain_disk_errors
from minicpmv_finetune.minicpmv.batch import collate, collate_packed
from minicpmv_finetune.minicpmv.checkpoint import copy_non_weight_files, fingerprint, load_model
from minicpmv_finetune.minicpmv.generations import Generation, detect_generation, write_max_slices
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL, ModelInput
from minicpmv_finetune.minicpmv.packed import enable_packing
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.reports.training_record import RECORD_FILE, TrainingRecord
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest
from minicpmv_finetune.tracking.step_runs import StepRun, open_step_run

from .arguments import Arguments, parse
from .callbacks import Sealer, Stopper, Watcher, peak_memory
from .checkpoints import Checkpoints
from .feature_store import FeatureStore, PatchFeatures, is_reusable, join, make_stores
from .fused_lora import fuse_adapters
from .liger import use_liger
from .packing import plan_packs
from .quantized import four_bit_options, prepare_four_bit
from .report import write_report
from .trainable import count_parameters, make_trainable
from .trainer import MiniCPMVTrainer
from .watchdog import Watchdog
from .worker_exit import end_again, leave

REPORT_FILE = "training.html"
UNSENT_FILE = "unsent_metrics.jsonl"
_NOT_PART_OF_THE_TRAINING = {
    *("output_dir", "checkpoint_uri", "cache_dir", "resume_from_checkpoint", "run_name", "report_to", "disable_tqdm"),
    *("logging_steps", "logging_strategy", "logging_first_step", "log_level", "save_strategy", "save_steps"),
    *("save_total_limit", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("local_rank", "project", "hub_token"),
}


def main(argv: Sequence[str]) -> None:
    """Train as the flags say; exits 2 with one sentence on a user's mistake, 75 when a retry goes on."""
    end_again()
    try:
        with explain_disk_errors():
            finetune(parse(argv, announce=_say), argv)
    except (UserError, RetryableError) as error:
        if leave(error.exit_code, str(error)):
            sys.exit(error.exit_code)
        end_process(error)
    except RuntimeError:
        # It may be no more than that another process was killed, in the midst of a collective.
        raise
    except Exception:
        leave(1)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def finetune(arguments: Arguments, argv: Sequence[str]) -> None:
    """Train, save, and leave a record; the story of the step, top to bottom."""
    training = arguments.training
    stopper = Stopper()
    _join_processes(training)
    shards = open_shards(arguments.data.data_path, _path(training.cache_dir))
    manifest = read_manifest(shards)
    base = storage.fetch(arguments.model.model_name_or_path, _path(training.cache_dir))
    model, generation = _load(base, arguments)
    if generation.version != manifest.generation:
        raise UserError(
            f"{shards}: prepared for MiniCPM-V {manifest.generation}, but {arguments.model.model_name_or_path} is "
            f"{generation.version}; run preprocess with this base model."
        )
    # Before the adapters' random start, which the Trainer's own seeding comes too late for.
    set_seed(training.seed)
    trained = make_trainable(model, generation, arguments)
    if training.use_lora and training.fused_lora and not (is_deepspeed_zero3_enabled() or training.fsdp):
        fuse_adapters(trained)
    if training.fp16:
        # Gradient scaling needs what is trained in float32.
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
        trained.enable_input_require_grads()
    trainable, total = count_parameters(trained)
    share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
    _say(f"{share} are trained on {manifest.rows('train'):,} samples")

    is_first = training.process_index == 0
    out = Path(str(training.output_dir))
    base_fingerprint = fingerprint(base)
    checkpoints = _checkpoints(arguments, manifest, base_fingerprint, out)
    training.output_dir = str(checkpoints.folder)
    resumed = _resume_from(training, checkpoints)
    stores = _vision_features(model, generation, shards, manifest, arguments)
    if training.packing:
        enable_packing(model, generation.language_model)
    train_rows: Dataset[Any] = _Rows(shards, "train", stores.get("train"))
    if training.packing:
        packs = plan_packs(manifest.lengths["train"], training.model_max_length, training.seed)
        _say(f"{manifest.rows('train'):,} samples in {len(packs):,} rows of at most {training.model_max_length} tokens")
        train_rows = _Packs(train_rows, packs)
    run = open_step_run("train") if is_first else StepRun()
    run.log_parameters(_settings(arguments) | {"base_fingerprint": base_fingerprint} | _surroundings(manifest))
    run.log_metrics({"parameters/trainable": trainable, "parameters/total": total})
    watchdog = Watchdog(training.ddp_timeout, training.process_index)
    watcher = Watcher(run, manifest.lengths["train"], " packs" if training.packing else " samples")
    trainer = MiniCPMVTrainer(
        model=trained,
        args=training,
        train_dataset=train_rows,
        eval_dataset=_Rows(shards, "eval", stores.get("eval")) if manifest.rows("eval") else None,
        data_collator=_Collator(manifest),
        compute_metrics=_token_accuracy,
        preprocess_logits_for_metrics=_most_likely,
        callbacks=[watcher, watchdog, Sealer(checkpoints), stopper],
        watcher=watcher,
        watchdog=watchdog,
        name_rows=lambda rows: [ShardReader(shards, "train", images=False)[row].id for row in rows],
        lengths=manifest.lengths["train"],
    )
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    # Both print every log line; the watcher shows one bar.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    status = "FAILED"
    try:
        outcome = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        checkpoints.finish_upload()
        if stopper.told:
            raise RetryableError(
                f"Training was told to stop after step {trainer.state.global_step} of {trainer.state.max_steps}; it is "
                f"kept in {training.checkpoint_uri or checkpoints.folder}, and running it again goes on from there."
            )
        record = TrainingRecord(
            base_model=arguments.model.model_name_or_path,
            base_fingerprint=base_fingerprint,
            generation=manifest.generation,
            data_fingerprint=manifest.data_fingerprint,
            max_slice_nums=manifest.max_slice_nums,
            use_lora=training.use_lora,
            parameters={"trainable": trainable, "total": total},
            metrics=_final_figures(outcome.metrics, watcher, training.world_size),
            arguments=json.loads(json.dumps(_settings(arguments), default=str)),
            history=[
                {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
                for entry in trainer.state.log_history
            ],
        )
        _save(trainer, base, out, record, argv, run)
        # None leaves, and takes the process group down, while another still works.
        trainer.accelerator.wait_for_everyone()
        if is_first and not training.checkpoint_uri:
            checkpoints.discard_local()
        status = "FINISHED"
    finally:
        run.finish(status)
        if is_first and run.unsent and status == "FINISHED":
            points = [{"name": one.key, "value": one.value, "step": one.step} for one in run.unsent]
            (out / UNSENT_FILE).write_text("".join(f"{json.dumps(point)}\n" for point in points))
    if is_first:
        report_outcome(f"loss {watcher.loss:.4f}, {share} trained")


def _join_processes(training: TransformersArguments) -> None:
    _ = training.device
    several_nodes = int(environment.LOCAL_WORLD_SIZE.read() or training.world_size) < training.world_size
    if several_nodes and training.deepspeed and training.load_best_model_at_end:
        # Each process would look for its part of that checkpoint on its own disk.
        raise UserError(
            "--early_stopping_patience: DeepSpeed cannot go back to the best checkpoint on several nodes; leave it and "
            "--load_best_model_at_end out, or use --strategy ddp."
        )
    if training.deepspeed and torch.distributed.is_initialized():
        import deepspeed

        # Learns of the process group that transformers has joined, which ZeRO-3 needs before the model is loaded.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def _load(base: Path, arguments: Arguments) -> tuple[PreTrainedModel, Generation]:
    training = arguments.training
    if not arguments.lora.q_lora:
        model, generation = load_model(base, _compute_dtype(training))
    else:
        generation = detect_generation(base)
        model, generation = load_model(base, _compute_dtype(training), **four_bit_options(generation, training))
        prepare_four_bit(model, training)
    if training.use_liger_kernel:
        use_liger(model.get_submodule(generation.language_model))
        training.use_liger_kernel = False  # transformers would try again, by the whole model's name
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.cuda.is_available()
    return model, generation


def _checkpoints(arguments: Arguments, manifest: Manifest, base_fingerprint: str, out: Path) -> Checkpoints:
    """Where this training's checkpoints lie, and what tells them from another's."""
    training = arguments.training
    settings = {name: value for name, value in _settings(arguments).items() if name not in _NOT_PART_OF_THE_TRAINING}
    # Addresses differ between a pod and its successor; what lies there does not.
    settings["data_path"], settings["model_name_or_path"] = manifest.data_fingerprint, base_fingerprint
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    uri = training.checkpoint_uri
    keep = training.save_total_limit or 2
    local = Path(uri) if uri and not storage.is_object_uri(uri) else out.with_name(f".{out.name}.checkpoints")
    if storage.is_object_uri(uri) or not uri:
        training.save_total_limit = min(keep, 2)
    return Checkpoints(local, uri if storage.is_object_uri(uri) else "", keep, digest, training.world_size)


def _resume_from(training: TransformersArguments, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from: the one asked for, or the newest complete one of this very training."""
    asked = training.resume_from_checkpoint
    if asked and str(asked).lower() not in {"true", "false"}:
        if not Path(asked).is_dir():
            raise UserError(f"--resume_from_checkpoint {asked}: no such folder; leave the flag out to find the newest.")
        return Path(asked)
    with training.main_process_first(desc="looking for checkpoints"):
        newest = checkpoints.newest()
    if newest:
        _say(f"going on from {newest.name}")
    return newest


def _save(
    trainer: MiniCPMVTrainer, base: Path, out: Path, record: TrainingRecord, argv: Sequence[str], run: StepRun
) -> None:
    """Write the adapter or the whole model so that it is there complete or not at all."""
    weights = trainer.gathered_weights()
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with storage.staged_folder(out) as folder:
        if record.use_lora:
            _check_adapter_moved(weights)
            for config in model.peft_config.values():
                # The address the user gave, not the place it was downloaded to.
                config.base_model_name_or_path = record.base_model
            model.save_pretrained(folder, state_dict=weights)
        else:
            copy_non_weight_files(base, folder)
            if is_deepspeed_zero3_enabled():
                # Loading under ZeRO-3 notes every renaming there is for the architecture, used or not; saving would
                # undo them all.
                model._weight_conversions = None
            model.save_pretrained(folder, state_dict=weights)
            write_max_slices(folder, record.max_slice_nums)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")
        write_report(folder / REPORT_FILE, record, argv)
        run.log_file(str(folder / REPORT_FILE))
        run.log_file(str(folder / RECORD_FILE))


def _check_adapter_moved(weights: Mapping[str, torch.Tensor]) -> None:
    """A LoRA update is B·A with B zero at first: if every B is still zero, nothing was learnt."""
    updates = [value for name, value in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
    if updates and not any(bool(value.any()) for value in updates):
        raise UserError("Training left every adapter at zero; raise --learning_rate or the number of steps.")


def _vision_features(
    model: PreTrainedModel, generation: Generation, shards: Path, manifest: Manifest, arguments: Arguments
) -> dict[Split, Path]:
    """Stores of what the vision tower sees, by split; empty where it has to run in each step."""
    training = arguments.training
    tower = model.get_submodule(generation.vision_tower)
    samples = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    passes = samples * training.world_size / manifest.rows("train") if samples > 0 else training.num_train_epochs
    if not training.reuse_vision_features or passes <= 1 or not is_reusable(model, tower):
        return {}
    splits: list[Split] = ["train"]
    if training.eval_strategy != "no" and manifest.rows("eval"):
        splits.append("eval")
    cache = storage.cache_folder(_path(training.cache_dir))
    return make_stores(model, generation, shards, splits, cache, training, _say)


@dataclasses.dataclass(frozen=True)
class _Example:
    """A row with its number, and what the vision tower saw where that is stored."""

    number: int
    row: ModelInput
    features: PatchFeatures | None


class _Rows(Dataset[_Example]):
    """One split's rows; workers open the files anew."""

    def __init__(self, shards: Path, split: Split, features: Path | None) -> None:
        self.features = FeatureStore(features) if features else None
        self.reader = ShardReader(shards, split, images=self.features is None)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> _Example:
        return _Example(position, self.reader[position], self.features[position] if self.features else None)


@dataclasses.dataclass(frozen=True)
class _Packs(Dataset[list[_Example]]):
    """Rows that share a row of the batch."""

    rows: Dataset[_Example]
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[_Example]:
        return [self.rows[row] for row in self.packs[number]]


@dataclasses.dataclass(frozen=True)
class _Collator:
    """Makes a batch of rows, and notes which they are."""

    manifest: Manifest

    def __call__(self, items: Sequence[_Example | list[_Example]]) -> dict[str, Any]:
        examples = [example for item in items for example in (item if isinstance(item, list) else [item])]
        rows = [example.row for example in examples]
        patch_size, resampler = self.manifest.patch_size, self.manifest.slicing["resampler"]
        if isinstance(items[0], list):
            batch = collate_packed(rows, patch_size, resampler)
        else:
            batch = collate(rows, self.manifest.pad_token_id, patch_size, "right", resampler)
        features = [example.features for example in examples if example.features is not None]
        return {**batch, **(join(features) if features else {}), "rows": [example.number for example in examples]}


def _most_likely(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The token each position would say: all that evaluation keeps of the logits, if there are any."""
    said: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return said.argmax(dim=-1) if said.is_floating_point() else said


def _token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of supervised tokens that would be said."""
    said, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    supervised = labels != IGNORED_LABEL
    return {"token_accuracy": float((said == labels)[supervised].mean())}


def _compute_dtype(training: TransformersArguments) -> torch.dtype | None:
    """bf16 and fp16 flags choose the frozen weights' type, as in the published script; else that of the file."""
    if training.fp16:
        return torch.float16
    return torch.bfloat16 if training.bf16 else torch.float32


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


def _surroundings(manifest: Manifest) -> dict[str, str]:
    """What else a figure hangs on: the data, the packages' versions, the code's commit."""
    from importlib.metadata import version

    packages = ("minicpmv-finetune", "torch", "transformers", "peft", "accelerate", "deepspeed")
    return {
        "data_fingerprint": manifest.data_fingerprint,
        "git_commit": environment.GIT_COMMIT.read(),
        **{f"version/{name}": version(name) for name in packages},
    }


def _final_figures(metrics: Mapping[str, float], watcher: Watcher, processes: int) -> dict[str, float]:
    """What a person wants to see at a glance, of what was measured."""
    measured = {"loss": metrics["train_loss"], "epochs": metrics["epoch"]}
    speed = {"samples/s": watcher.samples_per_second(processes), "seconds": watcher.seconds}
    counted = {"padding": watcher.padding, "waiting": watcher.waiting, "peak_memory_mb": peak_memory() / 1e6}
    return {**measured, **speed, **counted}


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _say(sentence: str) -> None:
    if environment.RANK.read() == "0":
        print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
