"""The training script that torchrun starts, one process per device.

    torchrun --nproc_per_node 2 -m minicpmv_finetune.components.train.finetune --data_path SHARDS …

It accepts the flags of OpenBMB's published finetune.py, reads shards, trains with transformers' Trainer and PEFT, and
writes a PEFT adapter (or, for a full fine-tune, a whole checkpoint) to `--output_dir`. The file `training.json` in that
folder records what was trained, on which data, and how the loss changed. A training that was interrupted continues from
its newest complete checkpoint.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from minicpmv_finetune import environment, storage
from minicpmv_finetune.cpu_memory import keep_freed_memory
from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.errors import RETRY_EXIT, RetryableError, UserError, explain_disk_errors, first_line
from minicpmv_finetune.estimate.cost import read_model
from minicpmv_finetune.git_commit import git_commit
from minicpmv_finetune.minicpmv.checkpoint import fingerprint, load_model
from minicpmv_finetune.minicpmv.generations import Generation, count_experts, generation_of, read_json
from minicpmv_finetune.minicpmv.layer_loops import import_numba
from minicpmv_finetune.minicpmv.linear_attention import missing_kernels
from minicpmv_finetune.minicpmv.packed import enable_packing
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.outputs import OutputFolder, check_cache, claimed_folder
from minicpmv_finetune.progress import report_outcome
from minicpmv_finetune.reports.training_record import TrainingRecord, mean_loss
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest
from minicpmv_finetune.shards.packing import Packs, group_by_tokens, pack_samples
from minicpmv_finetune.shards.sharing import Beginnings, SharedImages, nothing_shared, read_beginnings, share_images
from minicpmv_finetune.terminal import print_sentence
from minicpmv_finetune.tracking.step_runs import StepRun, open_step_run

from .arguments import Arguments, TrainingArguments, input_places, parse
from .callbacks import CheckpointSealer, SignalStopper, TrainingMonitor, peak_memory
from .checkpoint_place import PLACEHOLDER, Lease, choose_place
from .checkpoints import Checkpoints, claim_local_folder, local_folder
from .datasets import Collator, ExampleDataset, PackDataset
from .efficiency import Duration, measure_efficiency, trained_by_part
from .feature_store import (
    choose_encoding,
    compute_features,
    feature_argument,
    is_reusable,
    mixed_precision,
    prepare_stores,
)
from .flags import adapter_targets, find_unfit_flags
from .fsdp import is_fsdp2, prepare_for_fsdp
from .fused_lora import fuse_adapters
from .initial_adapter import (
    GRADIENT_SAMPLES,
    InitialAdapter,
    InitialAdapterSaver,
    begin_adapters,
    begin_again,
    changes_base,
    read_initial,
)
from .intervals import ChosenIntervals, saves_by_time
from .learning_rates import LearningRates, learning_rates, warn_of_tower
from .liger import use_liger
from .loading import LoaderPlan, check_shared_memory, describe_worker_failure, end_workers
from .masters import require_memory, train_in_float32
from .quantized import four_bit_options, prepare_four_bit
from .result import save_result
from .token_accuracy import token_accuracy
from .trainable import check_continued_adapter, count_parameters, make_trainable
from .trainer import MiniCPMVTrainer
from .training_identity import chosen_settings, effective_settings, training_digest
from .vision_ahead import VisionAhead, favors_helpers
from .watchdog import Watchdog
from .worker_exit import exit_folder, has_failed, record_crash, record_exit

UNSENT_FILE = "unsent_metrics.jsonl"


def main(argv: Sequence[str]) -> None:
    """Train with the given flags; exits with one sentence and 2 for a user's mistake, 75 if a retry may succeed."""
    try:
        with explain_disk_errors():
            finetune(parse(argv, announce=_warn), argv)
    except (UserError, RetryableError) as error:
        if not record_exit(error.exit_code, str(error)):
            print_sentence(f"error: {error}")
        _leave(error.exit_code)
    except Exception as error:
        code = _record_failure(error)
        if code is None:
            if not torch.distributed.is_initialized():
                raise
            traceback.print_exc()
            code = 1
        _leave(code)
    finally:
        end_workers()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _leave(code: int) -> NoReturn:
    """End this process after a failure, at once if other processes may wait for it.

    NCCL closes a process group only when its last operation has finished, which waits for processes that may never
    answer; then its own watchdog would end this process, and its report would hide the sentence.
    """
    end_workers()
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def finetune(arguments: Arguments, argv: Sequence[str]) -> None:
    """Train, save the result, and record the training; this function is the whole step from top to bottom."""
    training = arguments.training
    out = Path(str(training.output_dir)).expanduser().resolve()
    stopper = SignalStopper()
    _check_shared_memory(training)
    _join_process_group(training)
    if training.device.type == "cpu":
        keep_freed_memory()
    with _claimed_output(arguments, out) as output:
        _train(arguments, argv, stopper, out, output)


def _train(
    arguments: Arguments, argv: Sequence[str], stopper: SignalStopper, out: Path, output: OutputFolder | None
) -> None:
    training = arguments.training
    inputs = _fetch_inputs(arguments)
    model = _prepare_model(inputs, arguments)
    checkpoints = _open_checkpoints(arguments, inputs, out)
    resume_from = _find_checkpoint(training, checkpoints)
    train_dataset, eval_dataset = _open_datasets(inputs, model, arguments, checkpoints)
    with checkpoints.written_by_this_run(), _open_run(training, output) as run:
        run.log_parameters(_run_parameters(arguments, inputs))
        run.log_parameters(effective_settings(arguments))
        run.log_headline({}, _headline_settings(arguments, inputs))
        run.log_metrics({"parameters/trainable": model.trainable, "parameters/total": model.total})
        unit = " batches" if training.tokens_per_batch else " packs" if training.has_packed_rows else " samples"
        monitor = TrainingMonitor(run, inputs.manifest.lengths["train"], unit)
        trainer = _make_trainer(arguments, inputs, model, train_dataset, eval_dataset, monitor)
        _check_shared_memory(training, _plan_loaders(inputs, training, train_dataset, eval_dataset))
        initial = _begin_adapters(arguments, inputs, trainer, resume_from)
        _fuse_adapters(training, model)
        if training.device.type == "cpu":
            import_numba()
        if initial:
            trainer.add_callback(InitialAdapterSaver(initial))
        trainer.add_callback(CheckpointSealer(checkpoints))
        trainer.add_callback(ChosenIntervals(arguments.given))
        trainer.add_callback(stopper)
        outcome = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        checkpoints.finish_upload()
        if stopper.stop_requested:
            raise RetryableError(
                f"Training was stopped by {stopper.signal_name} after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; its state is saved in {training.checkpoint_uri or checkpoints.folder}, "
                "and running the same command again continues from there."
            )
        record = _make_record(arguments, inputs, model, monitor, trainer, outcome.metrics, resume_from)
        run.log_headline({"loss": record.final_loss})
        run.log_metrics(record.efficiency)
        kept = checkpoints.addresses() if "save_total_limit" in arguments.given and training.use_lora else []
        save_result(trainer, inputs.base, output, record, argv, run, kept, initial)
        # No process ends, and so closes the process group, while another one still works.
        trainer.accelerator.wait_for_everyone()
        if training.process_index == 0 and not training.checkpoint_uri:
            checkpoints.delete_local()
    if training.process_index == 0:
        report_outcome(f"loss {record.final_loss:.4f}, {model.share} trained")


@contextmanager
def _claimed_output(arguments: Arguments, out: Path) -> Iterator[OutputFolder | None]:
    """The output folder, claimed by the first process before any work; None in the others."""
    if arguments.training.process_index != 0:
        yield None
        return
    with claimed_folder(out, "train", input_places(arguments)) as output:
        yield output


def _join_process_group(training: TrainingArguments) -> None:
    """Let transformers create the process group, and let DeepSpeed use it."""
    _ = training.device
    several_nodes = int(environment.LOCAL_WORLD_SIZE.read() or training.world_size) < training.world_size
    if several_nodes and training.deepspeed and training.load_best_model_at_end:
        # Each process would look for its part of that checkpoint on its own disk.
        raise UserError(
            "--early_stopping_patience: DeepSpeed cannot return to the best checkpoint on several nodes; leave this "
            "flag and --load_best_model_at_end out, or use --strategy ddp."
        )
    if training.deepspeed and torch.distributed.is_initialized():
        import deepspeed

        # ZeRO-3 needs the process group before the model is loaded.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def _record_failure(error: Exception) -> int | None:
    """Record an error that has no sentence of its own.

    Returns:
        The exit code, if another process or a loader's worker was the cause; None if the traceback is worth reading.
    """
    sentence = describe_worker_failure(error)
    if sentence:
        if not record_exit(RETRY_EXIT, sentence, restart=True):
            print_sentence(f"error: {sentence}")
        return RETRY_EXIT
    has_lost_peer = isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
    if has_lost_peer and exit_folder():
        if not has_failed():
            print_sentence(f"training process {environment.RANK.read()} lost its connection to another one.")
        return 1
    # Errors of a device or of the network may be gone at the next attempt.
    if not has_lost_peer and not any(sign in str(error) for sign in _DEVICE_SIGNS):
        record_crash(error)
    return None


# Of exceptions that have no class of their own.
_DEVICE_SIGNS = ("CUDA", "cuDNN", "CUBLAS", "NCCL", "HIP error")


@dataclass(frozen=True)
class _Inputs:
    """What a training starts from.

    Attributes:
        shards: Local folder of the verified shards.
        manifest: Manifest of the shards.
        base: Local folder of the base model's checkpoint.
        base_fingerprint: Fingerprint of the base model's weights.
        generation: Generation of the base model.
    """

    shards: Path
    manifest: Manifest
    base: Path
    base_fingerprint: str
    generation: Generation


def _fetch_inputs(arguments: Arguments) -> _Inputs:
    check_cache(arguments.training.cache_dir or "", input_places(arguments))
    cache = _path(arguments.training.cache_dir)
    shards = open_shards(arguments.data.data_path, cache)
    manifest = read_manifest(shards)
    base = storage.fetch(arguments.model.model_name_or_path, cache)
    config_file = base / "config.json"
    config = read_json(config_file)
    generation = generation_of(config, str(config_file))
    if arguments.training.llm_type in generation.older_llm_types:
        _log(
            f"--llm_type {arguments.training.llm_type} is another name for the chat format of MiniCPM-V "
            f"{generation.version}, {generation.llm_type}"
        )
    if generation.version != manifest.generation:
        raise UserError(
            f"{shards}: prepared for MiniCPM-V {manifest.generation}, but {arguments.model.model_name_or_path} is "
            f"{generation.version}; run preprocess with this base model."
        )
    flags = {**vars(arguments.training), **vars(arguments.lora)}
    raise_mistakes(find_unfit_flags(flags, generation, count_experts(config)))
    inputs = _Inputs(shards, manifest, base, fingerprint(base), generation)
    check_continued_adapter(arguments, inputs.base_fingerprint)
    return inputs


@dataclass(frozen=True)
class _Model:
    """The model that is trained.

    Attributes:
        base: The base model itself.
        trained: The base model, or PEFT's wrapper around it.
        trainable: Number of parameters that are trained.
        total: Number of all parameters.
        rates: Learning rates by part.
    """

    base: PreTrainedModel
    trained: PreTrainedModel | PeftModel
    trainable: int
    total: int
    rates: LearningRates

    @property
    def share(self) -> str:
        """The trained share of the parameters, for a person."""
        return f"{self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.1%})"


def _prepare_model(inputs: _Inputs, arguments: Arguments) -> _Model:
    """Load the base model, and make it trainable as the flags describe."""
    training = arguments.training
    base = _load_base_model(inputs, arguments)
    # The adapters' random initialization comes before the Trainer's own seeding.
    set_seed(training.seed)
    trained = make_trainable(base, inputs.generation, arguments)
    rates = learning_rates(trained, inputs.generation, arguments)
    if warning := warn_of_tower(trained, inputs.generation, arguments):
        _warn(warning)
    require_memory(trained, training)
    if training.fsdp:
        prepare_for_fsdp(base, trained)
    if not training.deepspeed and not is_fsdp2(training):  # which keep float32 copies of what they train
        train_in_float32(trained, inputs.generation)
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
        trained.enable_input_require_grads()
    model = _Model(base, trained, *count_parameters(trained), rates)
    _log(f"{model.share} are trained on {inputs.manifest.rows('train'):,} samples")
    return model


def _load_base_model(inputs: _Inputs, arguments: Arguments) -> PreTrainedModel:
    training, generation = arguments.training, inputs.generation
    # As in the published script, the flags bf16 and fp16 choose the type of the frozen weights.
    dtype = torch.float16 if training.fp16 else torch.bfloat16 if training.bf16 else torch.float32
    # What each process has on the CPU, all of one machine have, and may check together.
    checked_part = (int(environment.LOCAL_RANK.read()), int(environment.LOCAL_WORLD_SIZE.read() or 1))
    attention: dict[str, Any] = {"attn_implementation": training.attn_implementation}
    if arguments.lora.q_lora:
        model, _ = load_model(inputs.base, dtype, checked_part, **attention, **four_bit_options(generation, training))
        prepare_four_bit(model, training)
    else:
        model, _ = load_model(inputs.base, dtype, checked_part, **attention, **_placement(inputs.base, training))
    if sentence := missing_kernels(model):
        _warn(sentence)
    if training.use_liger_kernel:
        use_liger(model.get_submodule(generation.language_model))
        training.use_liger_kernel = False  # transformers would try again, with the type of the whole model
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.cuda.is_available()
    return model


def _placement(base: Path, training: TrainingArguments) -> dict[str, Any]:
    """Arguments that load the weights directly onto this process's GPU, so that no process needs main memory for them.

    Where weights are divided among processes, each loads them on the CPU first; so does a model that a single GPU
    cannot hold, to be refused with a sentence by `require_memory`.
    """
    if training.device.type != "cuda" or training.fsdp or is_deepspeed_zero3_enabled():
        return {}
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    if size > torch.cuda.get_device_properties(training.device).total_memory:
        return {}
    return {"device_map": {"": training.device.index or 0}}


def _open_checkpoints(arguments: Arguments, inputs: _Inputs, out: Path) -> Checkpoints:
    """Describe where this training's checkpoints are, and let the Trainer write there."""
    training = arguments.training
    digest = training_digest(arguments, inputs.manifest.data_fingerprint, inputs.base_fingerprint)
    lease = _find_place(training, digest) if PLACEHOLDER in training.checkpoint_uri else None
    uri = training.checkpoint_uri
    is_remote = storage.is_object_uri(uri)
    keep = training.save_total_limit or 2
    folder = local_folder(uri, out)
    keep_local = training.save_total_limit if uri else keep
    if is_remote or (not uri and not training.use_lora):  # of a whole model none stays in the result
        keep_local = min(keep, 2)
    training.save_total_limit = None  # the Trainer would also delete the checkpoints of other trainings
    training.output_dir = str(folder)
    if training.process_index == 0:
        claim_local_folder(folder, out, input_places(arguments))
    return Checkpoints(folder, uri if is_remote else "", keep, digest, training.world_size, keep_local, lease)


def _find_place(training: TrainingArguments, digest: str) -> Lease | None:
    """Let all processes use the folder that the first one chooses for this training's checkpoints."""
    from_beginning = str(training.resume_from_checkpoint).lower() == "false"
    lease: Lease | None = None
    place = [""]
    failure: UserError | RetryableError | None = None
    if training.process_index == 0:
        try:
            place[0], lease = choose_place(training.checkpoint_uri, digest, training.world_size, from_beginning)
        except (UserError, RetryableError) as error:
            failure = error
    if training.world_size > 1:
        torch.distributed.broadcast_object_list(place)
    if failure or not place[0]:
        raise failure or RetryableError("the first process could not choose a folder for the checkpoints.")
    training.checkpoint_uri = place[0]
    if from_beginning:
        training.resume_from_checkpoint = None  # what is in that folder, this run has written
    return lease


def _find_checkpoint(training: TrainingArguments, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to resume from: the one that a flag names, or this training's newest complete one."""
    named = str(training.resume_from_checkpoint or "true")
    newest = None
    # One process of each machine looks, because every file of a checkpoint is read for its sha256.
    if training.local_process_index == 0:
        newest = checkpoints.newest() if named.lower() in {"true", "false"} else checkpoints.named(named)
    if torch.distributed.is_initialized():
        found: list[Path | None] = [None] * training.world_size
        torch.distributed.all_gather_object(found, newest)
        newest = found[training.process_index - training.local_process_index]
    if newest and named.lower() == "false":
        raise UserError(
            f"--resume_from_checkpoint false: {newest} is a checkpoint of this training; delete it or give another "
            "--checkpoint_uri to train from the beginning, or leave the flag out to continue."
        )
    if newest:
        _log(f"continuing from {newest.name}")
    elif others := checkpoints.places_of_others():
        _log(
            f"{others[0]} has checkpoints of a training with another base model, other data or other flags; they are "
            "not continued, and checkpoints of the same steps replace them"
        )
    return newest


def _open_datasets(
    inputs: _Inputs, model: _Model, arguments: Arguments, checkpoints: Checkpoints
) -> tuple[ExampleDataset | PackDataset, ExampleDataset | None]:
    """Open the samples for training and, if there are any, for evaluation."""
    training, manifest = arguments.training, inputs.manifest
    packs, shared = _pack(training, inputs, model)
    items = len(packs) if training.has_packed_rows else manifest.rows("train")
    _check_sizes(training, items, manifest)
    stores = _prepare_features(inputs, model, arguments, checkpoints, items)
    examples = ExampleDataset(inputs.shards, "train", stores.get("train"))
    train_dataset: ExampleDataset | PackDataset = examples
    if training.has_packed_rows:
        enable_packing(model.base, inputs.generation.language_model)
        train_dataset = PackDataset(examples, packs, shared)
    has_eval = bool(manifest.rows("eval"))
    return train_dataset, ExampleDataset(inputs.shards, "eval", stores.get("eval")) if has_eval else None


def _pack(training: TrainingArguments, inputs: _Inputs, model: _Model) -> tuple[Packs, Sequence[int]]:
    """The samples that share a row, nothing if every sample has its own; and the tokens that they share, by sample."""
    lengths = inputs.manifest.lengths["train"]
    samples, of_rows = f"{len(lengths):,} samples", lengths
    groups, shared = Packs([]), nothing_shared(len(lengths))
    if training.share_images:
        capacity = training.tokens_per_batch or training.model_max_length
        images = share_images(_read_beginnings(inputs, model), lengths, capacity, training.seed)
        groups, shared, of_rows = images.groups, images.shared, images.lengths(lengths)
        _log(_describe_sharing(images, lengths))
        samples = f"{len(groups):,} groups"
    if training.tokens_per_batch:
        packs = group_by_tokens(of_rows, training.tokens_per_batch, training.world_size, training.seed)
        mean = sum(of_rows) / max(len(packs), 1)
        _log(
            f"{samples} in {len(packs):,} batches of at most {training.tokens_per_batch:,} tokens, on average "
            f"{mean:,.0f} ({mean / training.tokens_per_batch:.0%}), without padding"
        )
    elif training.packing:
        packs = pack_samples(of_rows, training.model_max_length, training.seed)
        _log(f"{samples} in {len(packs):,} rows of at most {training.model_max_length} tokens")
    else:
        return groups, shared
    if not groups:
        return packs, shared
    return Packs([number for group in pack for number in groups[group]] for pack in packs), shared


def _read_beginnings(inputs: _Inputs, model: _Model) -> Beginnings:
    """The beginnings of all samples, which the first process reads for all."""
    found: list[Any] = [None]
    if environment.RANK.read() == "0":
        config: Any = model.base.config
        found[0] = Beginnings.of(read_beginnings(ShardReader(inputs.shards, "train"), config.image_token_id))
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    beginnings: Beginnings = found[0]
    return beginnings


def _describe_sharing(images: SharedImages, lengths: Sequence[int]) -> str:
    sharing = [len(group) for group in images.groups if len(group) > 1]
    samples, tokens, saved = sum(sharing), sum(lengths), sum(images.shared)
    return (
        f"{samples:,} of {len(lengths):,} samples share their images in {len(sharing):,} groups, so that {saved:,} of "
        f"{tokens:,} tokens ({saved / max(tokens, 1):.0%}) are not computed again; the others have images or texts in "
        "front of them of their own"
    )


def _check_sizes(training: TrainingArguments, rows: int, manifest: Manifest) -> None:
    """Check the flags that depend on the number of samples, or of the rows that they share.

    Raises:
        UserError: Nothing would be trained, or nothing evaluated.
    """
    at_once = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and rows < at_once:
        size = "tokens_per_batch" if training.tokens_per_batch else "per_device_train_batch_size"
        raise UserError(
            f"--dataloader_drop_last: a batch of {at_once} rows over all processes is larger than the data ({rows}), "
            f"so that nothing would be trained; lower --{size}, or leave the flag out."
        )
    if training.eval_strategy != "no" and not manifest.rows("eval"):
        raise UserError(
            f"--eval_strategy {training.eval_strategy}: there are no evaluation samples; give --eval_data_path or an "
            "eval_fraction to validate-data, or leave the flag out."
        )


def _prepare_features(
    inputs: _Inputs, model: _Model, arguments: Arguments, checkpoints: Checkpoints, items: int
) -> dict[Split, Path]:
    """The feature stores by split; none if the vision tower has to run in each step.

    Args:
        inputs: What the training starts from.
        model: The model.
        arguments: All flags.
        checkpoints: The training's checkpoints.
        items: Number of samples, or of the rows that they share, in an epoch.
    """
    training, manifest, generation = arguments.training, inputs.manifest, inputs.generation
    tower = model.base.get_submodule(generation.vision_tower)
    used = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    epochs = used * training.world_size / items if used > 0 else training.num_train_epochs
    if not training.reuse_vision_features or epochs <= 1 or not is_reusable(model.base, tower):
        return {}
    splits: list[Split] = ["train"]
    if training.eval_strategy != "no" and manifest.rows("eval"):
        splits.append("eval")
    cache = storage.cache_folder(_path(training.cache_dir))
    kept = checkpoints.keep_local or checkpoints.keep
    shares_disk = _share_a_disk(cache, Path(str(training.output_dir)))
    reserve = _bytes_to_write(arguments, model.trainable, kept) if shares_disk else 0
    return prepare_stores(model.base, generation, inputs.shards, splits, cache, training, _log, epochs, reserve)


def _bytes_to_write(arguments: Arguments, trainable: int, kept: int) -> int:
    """About what checkpoints and result need on the local disk: weights and two averages in float32, and weights."""
    saves = arguments.training.save_strategy != "no" or saves_by_time(arguments.given)
    # One more than are kept, while it is written. There is always a result.
    checkpoints = kept + 1 if saves else 0
    return trainable * (12 * checkpoints + 4)


def _share_a_disk(*folders: Path) -> bool:
    """Whether folders, which may not exist yet, are on one disk."""
    existing = [next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders]
    return len({path.stat().st_dev for path in existing}) == 1


@contextmanager
def _open_run(training: TrainingArguments, output: OutputFolder | None) -> Iterator[StepRun]:
    """The MLflow run; metrics that the server did not accept are written to a file in the result."""
    is_first = training.process_index == 0
    run = open_step_run("train") if is_first else StepRun()
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        run.finish(status)
        if output and run.unsent and status == "FINISHED":
            points = [{"name": metric.key, "value": metric.value, "step": metric.step} for metric in run.unsent]
            output.add_file(UNSENT_FILE, "".join(f"{json.dumps(point)}\n" for point in points))


def _run_parameters(arguments: Arguments, inputs: _Inputs) -> dict[str, Any]:
    """Everything that the metrics of a training depend on: settings, base model, data, code and libraries."""
    packages = ("minicpmv-finetune", "torch", "transformers", "peft", "accelerate", "deepspeed")
    return {
        **chosen_settings(arguments),
        "base_fingerprint": inputs.base_fingerprint,
        "data_fingerprint": inputs.manifest.data_fingerprint,
        "git_commit": git_commit(),
        **{f"version/{name}": version(name) for name in packages},
    }


def _headline_settings(arguments: Arguments, inputs: _Inputs) -> dict[str, Any]:
    """The settings by which the runs of pipelines are compared in MLflow."""
    training = arguments.training
    return {
        "base_model": arguments.model.model_name_or_path,
        "generation": inputs.generation.version,
        "data_fingerprint": inputs.manifest.data_fingerprint,
        "lora_r": arguments.lora.lora_r if training.use_lora else "none",
        "batch_size": _batch_size(training),
        "num_train_epochs": training.num_train_epochs,
        "learning_rate": training.learning_rate,
        "git_commit": git_commit(),
    }


def _batch_size(training: TrainingArguments) -> int | str:
    """Samples (or packed rows) of an optimizer step, or the most tokens."""
    batches = training.gradient_accumulation_steps * training.world_size
    tokens = training.tokens_per_batch
    return f"{batches * tokens} tokens" if tokens else batches * training.train_batch_size


def _make_trainer(
    arguments: Arguments,
    inputs: _Inputs,
    model: _Model,
    train_dataset: ExampleDataset | PackDataset,
    eval_dataset: ExampleDataset | None,
    monitor: TrainingMonitor,
) -> MiniCPMVTrainer:
    training = arguments.training
    examples = train_dataset.examples if isinstance(train_dataset, PackDataset) else train_dataset
    watchdog = Watchdog(training.ddp_timeout, training.process_index)
    trainer = _build(
        model=model.trained,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(inputs.manifest),
        compute_metrics=token_accuracy,
        callbacks=[monitor, watchdog],
        monitor=monitor,
        watchdog=watchdog,
        sample_ids=lambda rows: [ShardReader(inputs.shards, "train", images=False)[row].id for row in rows],
        lengths=inputs.manifest.lengths["train"],
        rates=model.rates,
        vision_ahead=_look_ahead(arguments, inputs, model, examples),
    )
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    # Both would print every logged metric; the monitor draws one bar.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _look_ahead(arguments: Arguments, inputs: _Inputs, model: _Model, examples: ExampleDataset) -> VisionAhead | None:
    """What runs frozen vision modules for the next batch, where threads of a CPU can be divided."""
    training, generation = arguments.training, inputs.generation
    if training.device.type != "cpu" or torch.get_num_threads() < 2 or examples.features:
        return None
    # Those divide weights or compute in types of their own, and a compiled model depends on the number of threads.
    if training.deepspeed or training.fsdp or training.torch_compile:
        return None
    if not is_reusable(model.base, model.base.get_submodule(generation.vision_tower)):
        return None
    encoding = choose_encoding(model.base, generation, training)

    def compute(pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), mixed_precision(training):
            return compute_features(model.base, encoding, pixels, sizes)

    sizes = read_model(inputs.base, adapter_targets(vars(arguments.lora)))
    favors = partial(favors_helpers, sizes, trained_by_part(model.trained, generation))
    return VisionAhead(compute, feature_argument(encoding.merged), favors)


def _begin_adapters(
    arguments: Arguments, inputs: _Inputs, trainer: MiniCPMVTrainer, resume_from: Path | None
) -> InitialAdapter | None:
    """The first values of adapters that begin with a part of the base's weights, which are then without it."""
    training, lora = arguments.training, arguments.lora
    model: Any = trainer.model
    if not training.use_lora or not changes_base(lora):
        return None
    if resume_from:
        initial = read_initial(resume_from)
        begin_again(model, initial)
        return initial
    dataset: Any = trainer.train_dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(training.seed))
    chosen = order[:GRADIENT_SAMPLES].tolist()
    collate = Collator(inputs.manifest)

    def compute_gradients() -> None:
        for start in range(0, len(chosen), training.train_batch_size):
            batch = collate([dataset[number] for number in chosen[start : start + training.train_batch_size]])
            del batch["rows"]
            batch.pop("shared_tokens", None)
            with trainer.compute_loss_context_manager():
                loss = model(**trainer._prepare_inputs(batch), use_cache=False, loss_only=True).loss
            loss.backward()

    started = time.monotonic()
    model.to(training.device)
    initial = begin_adapters(model, lora, training.seed, compute_gradients)
    _log(f"{len(initial) // 2} adapters begin as {lora.init_lora_weights} ({time.monotonic() - started:.0f} s)")
    return initial


def _fuse_adapters(training: TrainingArguments, model: _Model) -> None:
    """Compute each layer and its adapter in one operation, where that is known and the weights are whole."""
    if not (training.use_lora and training.fused_lora) or is_deepspeed_zero3_enabled() or training.fsdp:
        return
    if reasons := fuse_adapters(model.trained):
        _log(f"--fused_lora: PEFT computes the adapters itself, because of {' and '.join(reasons)}")


def _build(**options: Any) -> MiniCPMVTrainer:
    """The trainer; a value that transformers refuses only here is the user's mistake."""
    try:
        return MiniCPMVTrainer(**options)
    except (ValueError, ImportError) as error:
        raise UserError(f"Training arguments: {first_line(error)}") from error


def _check_shared_memory(training: TrainingArguments, plans: Sequence[LoaderPlan] = ()) -> None:
    """Check that the loaders' workers can hand over their batches, at first in general, then for these loaders."""
    # One process checks for all of this machine.
    if training.dataloader_num_workers and environment.LOCAL_RANK.read() == "0":
        processes = int(environment.LOCAL_WORLD_SIZE.read() or 1)
        check_shared_memory(plans, training.dataloader_num_workers, training.dataloader_prefetch_factor, processes)


def _plan_loaders(
    inputs: _Inputs,
    training: TrainingArguments,
    train_dataset: ExampleDataset | PackDataset,
    eval_dataset: ExampleDataset | None,
) -> list[LoaderPlan]:
    collate = Collator(inputs.manifest)
    plans = [LoaderPlan(train_dataset, training.train_batch_size, collate)]
    if eval_dataset is not None and training.eval_strategy != "no":
        plans.append(LoaderPlan(eval_dataset, training.eval_batch_size, collate))
    return plans


def _make_record(
    arguments: Arguments,
    inputs: _Inputs,
    model: _Model,
    monitor: TrainingMonitor,
    trainer: MiniCPMVTrainer,
    metrics: Mapping[str, float],
    resume_from: Path | None,
) -> TrainingRecord:
    history = [
        {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in trainer.state.log_history
    ]
    # A training that was continued measures only its last part, and nothing where no step was left.
    whole = mean_loss(history) if resume_from else None
    measured = {
        "samples/s": monitor.samples_per_second(arguments.training.world_size),
        "seconds": monitor.seconds,
        "padding": monitor.padding,
        "waiting": monitor.waiting,
        **({"tokens/batch": monitor.tokens_per_batch} if arguments.training.tokens_per_batch else {}),
        **({"shared_tokens": monitor.shared_share} if arguments.training.share_images else {}),
    }
    steps = trainer.state.global_step
    duration = Duration(
        monitor.seconds, monitor.seconds_before + monitor.seconds, (steps - monitor.first_step) / max(steps, 1)
    )
    gpu = torch.cuda.get_device_name() if arguments.training.device.type == "cuda" else ""
    efficiency = measure_efficiency(
        arguments, inputs.base, inputs.generation, model.trained, trainer.counter, duration, gpu
    )
    return TrainingRecord(
        base_model=arguments.model.model_name_or_path,
        base_fingerprint=inputs.base_fingerprint,
        generation=inputs.manifest.generation,
        data_fingerprint=inputs.manifest.data_fingerprint,
        max_slice_nums=inputs.manifest.max_slice_nums,
        use_lora=arguments.training.use_lora,
        parameters={"trainable": model.trainable, "total": model.total},
        metrics={
            "loss": metrics["train_loss"] if whole is None else whole,
            "epochs": metrics["epoch"],
            **(measured if monitor.samples else {}),
            "peak_memory_mb": peak_memory() / 1e6,
            **efficiency.metrics,
        },
        planned=efficiency.planned,
        arguments=json.loads(json.dumps(chosen_settings(arguments), default=str)),
        history=history,
        continued_from=int(resume_from.name.rpartition("-")[2]) if resume_from else 0,
    )


def _path(text: str | None) -> Path | None:
    return storage.local_path(text) if text else None


def _log(sentence: str) -> None:
    """Print a sentence once, in the first process, unless only warnings are wanted."""
    if not environment.QUIET.read():
        _warn(sentence)


def _warn(sentence: str) -> None:
    """Print a warning once, in the first process."""
    if environment.RANK.read() == "0":
        print_sentence(sentence)


if __name__ == "__main__":
    main(sys.argv[1:])
