"""QLoRA: the language model's frozen weights in 4 bits (NF4, double quantization); the vision side stays unchanged."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import TrainingArguments as TransformersArguments

from minicpmv_finetune import environment
from minicpmv_finetune.minicpmv.generations import Generation


def four_bit_options(generation: Generation, training: TransformersArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load the language model in 4 bits, onto this process's own device.

    Vision tower and merger are not quantized: they are small, and their precision affects every image. The head, which
    decides between tokens, is not quantized either.
    """
    compute_dtype = torch.float16 if training.fp16 else torch.bfloat16 if training.bf16 else torch.float32
    device = int(environment.LOCAL_RANK.read()) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[generation.vision_tower, generation.merger, "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def prepare_four_bit(model: PreTrainedModel, training: TransformersArguments) -> None:
    """Freeze the quantized weights, and keep norms in float32, as PEFT recommends."""
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=bool(training.activation_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
