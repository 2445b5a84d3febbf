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
    """Freeze all weights; adapters, and what is trained whole, come afterwards.

    PEFT's own function would also convert everything that is not quantized to float32: with embeddings, head and vision
    tower, 3 GB for a model of 8 billion parameters. In bf16 nothing of that needs it, because norms compute in float32
    anyway. In float16 the sums of the language model's layers may exceed the type's range, so its embeddings, from
    which these sums start, are float32.
    """
    model.requires_grad_(False)
    if training.fp16:
        model.get_input_embeddings().float()
