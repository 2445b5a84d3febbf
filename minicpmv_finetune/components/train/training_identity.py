"""The digest of a training: an interrupted training continues only from checkpoints with its own digest.

The digest covers the chosen settings, the data and the base model. A flag that changes neither weights nor their order
of updates does not take part, so that a retry may, for example, write more often to its log. Flags of ours are
classified by their metadata (`arguments.IN_DIGEST`), flags of transformers by the two tables below; a test fails for a
flag that is in neither. Checkpoints that are already written keep their digest, so a flag may not change its class, and
a flag that is added later takes part only with another value than its default (`UNLESS_DEFAULT`).
"""

import dataclasses
import hashlib
import json
import re
from typing import Any

from .arguments import IN_DIGEST, UNLESS_DEFAULT, Arguments

TRANSFORMERS_NOT_IN_DIGEST = frozenset(
    {
        *("output_dir", "run_name", "report_to", "project", "disable_tqdm", "hub_token", "local_rank"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_level"),
        *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
        "dataloader_pin_memory",
    }
)
TRANSFORMERS_IN_DIGEST = frozenset(
    {
        # How long, in which batches and which order.
        *("per_device_train_batch_size", "num_train_epochs", "max_steps", "gradient_accumulation_steps"),
        *("auto_find_batch_size", "seed", "data_seed", "full_determinism", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "dataloader_drop_last", "dataloader_in_order"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "train_sampling_strategy"),
        *("length_column_name", "label_names"),
        # How the weights are updated.
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim_args", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "max_grad_norm"),
        *("average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha"),
        # How the model is computed.
        *("fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "use_cache", "torch_empty_cache_steps"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("use_liger_kernel", "liger_kernel_config"),
        # How several processes share the work.
        *("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        # Evaluation decides which checkpoint is the best, and when training stops early.
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
        *("prediction_loss_only", "include_for_metrics", "load_best_model_at_end", "metric_for_best_model"),
        *("greater_is_better", "do_train", "do_eval", "do_predict"),
        # These change no weight, but have been part of the digest since 0.1.0.
        *("ddp_timeout", "debug", "skip_memory_metrics", "log_on_each_node", "log_level_replica"),
        *("logging_nan_inf_filter", "include_num_input_tokens_seen", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    }
)

_EMBEDDINGS_OR_NONE = re.compile(r"(^|[\s,.])(embed_tokens|none)\s*(,|$)")
_FROZEN_EMBEDDINGS = "frozen embeddings"
"""0.1.0 trained the embeddings whole in QLoRA too, unless none was asked for; its checkpoints do not fit otherwise."""
_CHANGES_AT_A_RETRY = ("local_rank", "resume_from_checkpoint")


def chosen_settings(arguments: Arguments) -> dict[str, Any]:
    """All flags of ours, and those flags of transformers that differ from their default; without secrets."""
    settings: dict[str, Any] = {}
    for group in (arguments.model, arguments.data, arguments.training, arguments.lora):
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            default = item.default if item.default is not dataclasses.MISSING else None
            if IN_DIGEST in item.metadata or value != default:
                settings[item.name] = value
    settings.pop("hub_token", None)
    return settings


def effective_settings(arguments: Arguments) -> dict[str, Any]:
    """The flags that `chosen_settings` leaves out, with the values that they took; without secrets."""
    chosen = chosen_settings(arguments)
    groups = (vars(arguments.model), vars(arguments.data), arguments.training.to_dict(), vars(arguments.lora))
    left_out = {*chosen, "hub_token", *_CHANGES_AT_A_RETRY}
    own = (arguments.model, arguments.data, arguments.training, arguments.lora)
    flags = {item.name for group in own for item in dataclasses.fields(group)}
    return {name: value for group in groups for name, value in group.items() if name in flags - left_out}


def training_digest(arguments: Arguments, data_fingerprint: str, base_fingerprint: str) -> str:
    """Compute the digest of a training.

    Args:
        arguments: Flags of the training.
        data_fingerprint: Fingerprint of the data; its address may differ between a pod and its successor.
        base_fingerprint: Fingerprint of the base model's weights, likewise instead of the address.
    """
    settings = {name: value for name, value in chosen_settings(arguments).items() if _is_in_digest(name, value)}
    settings["data_path"], settings["model_name_or_path"] = data_fingerprint, base_fingerprint
    if arguments.lora.q_lora and not _EMBEDDINGS_OR_NONE.search(arguments.lora.lora_modules_to_save):
        settings["q_lora"] = _FROZEN_EMBEDDINGS
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _is_in_digest(name: str, value: Any) -> bool:
    """Whether a flag takes part; a flag of transformers that is not classified yet does."""
    own = _OWN_FLAGS.get(name)
    if own is None:
        return name not in TRANSFORMERS_NOT_IN_DIGEST
    kind = own.metadata[IN_DIGEST]
    return value != own.default if kind == UNLESS_DEFAULT else bool(kind)


_OWN_FLAGS = {
    item.name: item
    for group in dataclasses.fields(Arguments)
    if dataclasses.is_dataclass(group.type)
    for item in dataclasses.fields(group.type)
    if IN_DIGEST in item.metadata
}
