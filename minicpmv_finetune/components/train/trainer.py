"""transformers' Trainer, which also stops at a loss or gradient that is not finite, and gathers distributed weights."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from minicpmv_finetune.errors import UserError

from .arguments import TrainingArguments
from .callbacks import TrainingMonitor
from .efficiency import WorkCounter
from .learning_rates import LearningRates
from .loading import Explained, HandOver, start_worker, unless_error, use_short_socket_paths
from .sampler import LengthGroupedSampler, ShuffledSampler
from .token_accuracy import count_right
from .vision_ahead import VisionAhead
from .watchdog import BACKWARD, FORWARD, Watchdog

_MAX_LISTED_SAMPLES = 16


class MiniCPMVTrainer(Trainer):
    """A Trainer whose batches contain the numbers of their rows, so that an error can name the samples."""

    args: TrainingArguments

    def __init__(
        self,
        *,
        monitor: TrainingMonitor,
        watchdog: Watchdog,
        sample_ids: Callable[[Sequence[int]], list[str]],
        lengths: Sequence[int],
        rates: LearningRates | None = None,
        vision_ahead: VisionAhead | None = None,
        **arguments: Any,
    ) -> None:
        """Create the trainer.

        Args:
            monitor: Counts samples, tokens, padding, and the time spent on waiting for batches.
            watchdog: Is informed of each stage of a step.
            sample_ids: Returns the ids of samples by their row numbers.
            lengths: Number of tokens of each training sample, so that no sample is read to find its length.
            rates: Learning rates by part; by default all have the same.
            vision_ahead: Runs frozen vision modules for the next batch; by default the model runs them.
            **arguments: Arguments of transformers' Trainer.
        """
        super().__init__(**arguments)
        self._order: ShuffledSampler | LengthGroupedSampler | None = None
        self._monitor = monitor
        self._watchdog = watchdog
        self._lengths = lengths
        self._sample_ids = sample_ids
        self._rates = rates
        self._vision_ahead = vision_ahead
        self.counter = WorkCounter()
        self._rows: list[int] = []  # row numbers of the batches since the last optimizer step

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with the learning rates of the parts and of LoRA+."""
        rates = self._rates
        if rates is None or rates.are_equal or self.optimizer is not None:
            return super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        if rates.ratio is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = rates.create_plus_optimizer(trained, kind, options, self.args.weight_decay)
        optimizer = super().create_optimizer(model)
        rates.divide(optimizer, trained)
        return optimizer

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Run an epoch, unless the checkpoint that is continued has every step: transformers would add another one.

        Where several processes continue in the middle of an epoch, Accelerate does not tell the sampler which.
        """
        if self._order is not None:
            self._order.set_epoch(options["epoch"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train; no thread computes afterwards, whatever ended the training."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._vision_ahead:
                self._vision_ahead.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradients of a batch.

        Raises:
            UserError: The loss is not finite, and the message names the samples; or the batch does not fit in memory.
        """
        rows, shared = inputs.pop("rows"), inputs.pop("shared_tokens", 0)
        self._monitor.count_batch(rows, inputs["input_ids"].numel(), shared)
        self.counter.add(inputs, [self._monitor.lengths[row] for row in rows], shared)
        self._rows += rows
        self._watchdog.enter_stage(FORWARD)
        try:
            if self._vision_ahead:
                self._vision_ahead.finish(inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:  # includes torch.OutOfMemoryError; the CPU's allocator has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            raise self._out_of_memory(inputs) from error
        if not bool(torch.isfinite(loss)):
            raise self._not_finite("loss", float(loss), rows)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """Compute the loss without a key-value cache, and without logits that nothing needs.

        Only label smoothing needs the logits of all tokens.
        """
        inputs = {**inputs, "use_cache": False}
        if self.args.supervised_logits_only and self.label_smoother is None:
            inputs["loss_only"] = True
        loss = super().compute_loss(model, inputs, *rest, **options)
        self._watchdog.enter_stage(BACKWARD)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers' estimate; transformers itself counts the parameters in each step, which takes milliseconds."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    @cached_property
    def _parameters(self) -> int:
        model: Any = self.model
        return int(model.num_parameters(exclude_embeddings=True))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any, **options: Any) -> Any:
        """Get the next batches, begin the vision of the one after them, and measure the time spent on waiting."""
        self._watchdog.wait_for_data(self.state.global_step + 1)
        started = time.perf_counter()
        read = self._vision_ahead.read(epoch_iterator) if self._vision_ahead else epoch_iterator
        batches = super().get_batch_samples(map(unless_error, read), *arguments, **options)
        self._monitor.seconds_waiting += time.perf_counter() - started
        return batches

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate with all threads; workers of an evaluation's loader are forked while no other thread computes."""
        if self._vision_ahead:
            self._vision_ahead.pause()
        return super().evaluate(*arguments, **options)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """Evaluate a batch; returns its loss, and what is counted of each sample in place of tokens and labels."""
        unless_error(inputs)
        inputs.pop("rows", None)
        loss, predicted, labels = super().prediction_step(model, inputs, *rest, **options)
        if predicted is None or labels is None:
            return loss, predicted, labels
        counts = count_right(predicted, labels)
        return loss, counts, counts

    def gathered_weights(self) -> dict[str, torch.Tensor]:
        """Gather the trained weights on the first process; every process must call this method.

        Returns:
            Weights by name: for LoRA those of the adapter and of the modules that are trained whole, otherwise all.
            Empty on the other processes if the strategy partitions weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            engine: Any = self.model_wrapped
            adapted = any("lora_" in name for name, _ in model.named_parameters())
            gathered = dict(engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapted) or {})
            return gathered | self._gather_unused(model)
        if self.is_fsdp_enabled:
            return dict(self.accelerator.get_state_dict(self.model_wrapped))
        return dict(model.state_dict())

    def _gather_unused(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Gather under ZeRO-3 what stays frozen in modules that are trained whole, because the model never uses it."""
        import deepspeed

        frozen = {
            name: weight
            for name, weight in model.named_parameters()
            if ".modules_to_save." in name and not weight.requires_grad
        }
        with deepspeed.zero.GatheredParameters(list(frozen.values())):
            is_first = self.args.process_index == 0
            return {name: weight.detach().cpu().clone() for name, weight in frozen.items() if is_first}

    def _get_dataloader(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        """Make a data loader that explains its errors, and whose start draws no number from torch's generator.

        Persistent workers start once, and once more in a resumed training. If their start drew from the generator that
        dropout uses, the two trainings would differ. (Nothing in a row is random, so workers need no seeds.)
        """
        if self.args.dataloader_num_workers:
            use_short_socket_paths()
        loader: Any = super()._get_dataloader(Explained(dataset), *arguments, **options)
        base_loader = getattr(loader, "base_dataloader", loader)
        base_loader.generator = torch.Generator()
        base_loader.worker_init_fn = start_worker
        base_loader.collate_fn = HandOver(base_loader.collate_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "random":
            dataset: Any = self.train_dataset if train_dataset is None else train_dataset
            seed = torch.initial_seed() if self.args.data_seed is None else self.args.data_seed
            self._order = ShuffledSampler(len(dataset), seed)
            return self._order
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._order = LengthGroupedSampler(self._lengths, batch_size, self.args.data_seed or self.args.seed)
        return self._order

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """Evaluate in the order of the data; to group it by length too, transformers would read every sample."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows, self._rows = self._rows, []
        # With loss scaling, the scaler detects a gradient that overflows, and skips it.
        if norm is not None and not self.args.fp16 and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise self._not_finite("gradient's norm", float(norm), rows)
        return norm

    def _not_finite(self, quantity: str, value: float, rows: Sequence[int]) -> UserError:
        names = ", ".join(self._sample_ids(rows[:_MAX_LISTED_SAMPLES]))
        rest = f" and {len(rows) - _MAX_LISTED_SAMPLES} more" if len(rows) > _MAX_LISTED_SAMPLES else ""
        return UserError(
            f"The {quantity} is {value} at step {self.state.global_step + 1}, on the samples {names}{rest}; check "
            "these samples, lower --learning_rate, or compute in float32; the last good checkpoint is kept."
        )

    def _out_of_memory(self, inputs: dict[str, Any]) -> UserError:
        rows, length = inputs["input_ids"].shape
        slices = len(inputs.get("target_sizes", ()))
        tokens, samples = self.args.tokens_per_batch, self.args.train_batch_size
        remedies = [f"lower --tokens_per_batch (now {tokens})"] if tokens else []
        remedies += [f"lower --per_device_train_batch_size (now {samples})"] if rows > 1 else []
        remedies += ["preprocess with a smaller --max-slice-nums"] if slices > 1 else []
        remedies += [] if self.args.activation_checkpointing else ["turn on --gradient_checkpointing"]
        remedies += [] if self.args.deepspeed else ["partition the weights over several devices by --strategy zero3"]
        return UserError(
            f"Training process {self.args.process_index} ran out of memory at step {self.state.global_step + 1}, on a "
            f"batch of {rows} × {length:,} tokens and {slices} slices; {', or '.join(remedies)}."
        )
