"""transformers' Trainer, which also stops at numbers that are none, and gathers weights wherever they lie."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from minicpmv_finetune.errors import UserError

from .arguments import TrainingArguments
from .callbacks import Watcher, leave_stopping_to_trainer
from .packing import LengthGroupedSampler
from .watchdog import Watchdog


class MiniCPMVTrainer(Trainer):
    """Each batch carries the numbers of its rows, so that a failure can name its samples."""

    args: TrainingArguments

    def __init__(
        self,
        *,
        watcher: Watcher,
        watchdog: Watchdog,
        name_rows: Callable[[Sequence[int]], list[str]],
        lengths: Sequence[int],
        **arguments: Any,
    ) -> None:
        """The watcher counts what is trained on; `name_rows` gives the ids of samples by row number.

        Lengths are those of the training samples in tokens, so that none is read to learn its own.
        """
        super().__init__(**arguments)
        self._watcher = watcher
        self._watchdog = watchdog
        self._lengths = lengths
        self._name_rows = name_rows
        self._rows: list[int] = []  # of the batches since the last optimizer step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a batch; a loss that is no number ends the run before it reaches a weight.

        Raises:
            UserError: with the samples of the batch, or memory did not suffice for it.
        """
        rows = inputs.pop("rows")
        self._watcher.count(rows, inputs["input_ids"].numel())
        self._rows += rows
        self._watchdog.reached(1)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the allocator of main memory has none of its own
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            raise self._out_of_memory(inputs) from error
        if not bool(torch.isfinite(loss)):
            raise self._not_finite("loss", float(loss), rows)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """The loss; smoothed labels alone need all logits, and nobody the keys and values that generation keeps."""
        inputs = {**inputs, "use_cache": False}
        if self.args.supervised_logits_only and self.label_smoother is None:
            inputs["loss_only"] = True
        loss = super().compute_loss(model, inputs, *rest, **options)
        self._watchdog.reached(2)
        return loss

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The next batches; how long they are waited for is counted."""
        started = time.perf_counter()
        batches = super().get_batch_samples(*arguments, **options)
        self._watcher.waited += time.perf_counter() - started
        return batches

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """Batches, whose workers leave stopping to the trainer, and whose start draws no number that dropout would.

        Workers that stay start once, and in a resumed training once more: by torch's common generator the two would
        not train the same. (Rows have nothing random, so workers need no seeds.)
        """
        loader: Any = super()._get_dataloader(*arguments, **options)
        own = getattr(loader, "base_dataloader", loader)
        own.generator = torch.Generator()
        own.worker_init_fn = leave_stopping_to_trainer
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(self._lengths, together, self.args.data_seed or self.args.seed)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """Evaluate a batch."""
        inputs.pop("rows", None)
        return super().prediction_step(model, inputs, *rest, **options)

    def gathered_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights by name, whole on the first process; every process takes part.

        Returns:
            For LoRA the adapter's and what is trained whole, else all weights; empty on the other processes where the
            strategy cuts weights into parts.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            engine: Any = self.model_wrapped
            adapted = any("lora_" in name for name, _ in model.named_parameters())
            gathered = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapted)
            return dict(gathered or {})
        if self.is_fsdp_enabled:
            return dict(self.accelerator.get_state_dict(self.model_wrapped))
        return dict(model.state_dict())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        rows, self._rows = self._rows, []
        # With loss scaling a gradient that overflows is found and skipped by the scaler.
        if norm is not None and not self.args.fp16 and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise self._not_finite("gradient's norm", float(norm), rows)
        return norm

    def _not_finite(self, what: str, value: float, rows: Sequence[int]) -> UserError:
        names = ", ".join(self._name_rows(rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
        return UserError(
            f"The {what} is {value} at step {self.state.global_step + 1}, on the samples {names}; look at them, lower "
            "--learning_rate, or compute in float32; the last good checkpoint is kept."
        )

    def _out_of_memory(self, inputs: dict[str, Any]) -> UserError:
        rows, length = inputs["input_ids"].shape
        slices = len(inputs.get("target_sizes", ()))
        ways = [f"lower --per_device_train_batch_size (now {self.args.train_batch_size})"] if rows > 1 else []
        ways += ["preprocess with a smaller --max-slice-nums"] if slices > 1 else []
        ways += [] if self.args.activation_checkpointing else ["turn on --gradient_checkpointing"]
        ways += [] if self.args.deepspeed else ["share the weights between devices by --strategy zero3"]
        return UserError(
            f"Training process {self.args.process_index} ran out of memory at step {self.state.global_step + 1}, on a "
            f"batch of {rows} × {length:,} tokens and {slices} slices; {', or '.join(ways)}."
        )
