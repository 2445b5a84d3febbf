"""One of two processes that share the weights; only the first has an image. Writes the losses of two steps and an
evaluation, in which only the second has one.

python -m torch.distributed.run --nproc_per_node 2 partitioned_worker.py STRATEGY CHECKPOINT OUT
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.integrations import HfDeepSpeedConfig

from minicpmv_finetune.components.train.trainable import keep_present_classes
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import ModelInput

MAX_GRAD_NORM = 1.0
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": MAX_GRAD_NORM,
}

Step = Callable[[torch.Tensor], None]


def batch(encoder: Encoder, shows_image: bool) -> dict[str, torch.Tensor]:
    """Return a batch of one sample with the same text, with or without an image of 8 × 8 patches."""
    image = encoder.generation.image_token * (encoder.tokens_per_slice or 4)
    question = f"<image>{image}</image>\nWhat?" if shows_image else "What?"
    answer = "<|im_start|>assistant\nThe digit is 3.<|im_end|>\n"
    encoded = encoder.encode_text(f"<|im_start|>user\n{question}<|im_end|>\n{answer}")
    slices = [np.full((112, 112, 3), 90, dtype=np.uint8)] if shows_image else []
    return collate([ModelInput("", encoded.input_ids, encoded.labels, slices)], 0, 14, "right")


def _under_zero3(checkpoint: Path) -> tuple[Any, Step]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    settings = HfDeepSpeedConfig(SETTINGS)  # for transformers ZeRO-3 is on as long as this object exists
    model, _ = load_model(checkpoint, torch.float32)
    assert settings.is_zero3()
    parameters: list[Any] = list(model.parameters())
    assert all(parameter.ds_numel for parameter in parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine: Any
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    engine.transformers_settings = settings

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step


def _under_fsdp2(checkpoint: Path) -> tuple[Any, Step]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model: Any
    model, _ = load_model(checkpoint, torch.float32)
    keep_present_classes(model)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def main(strategy: str, checkpoint: Path, out: Path) -> None:
    """Load the model sharded, train two steps, and evaluate with the image in the other process."""
    rank = int(os.environ["RANK"])
    encoder = Encoder.from_checkpoint(checkpoint)
    model, step = (_under_zero3 if strategy == "zero3" else _under_fsdp2)(checkpoint)
    losses = []
    for _ in range(2):
        loss = model(**batch(encoder, shows_image=rank == 0), use_cache=False).loss
        step(loss)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        losses.append(model(**batch(encoder, shows_image=rank == 1), use_cache=False).loss.item())
    (out / f"{rank}.json").write_text(json.dumps(losses))
    if strategy == "fsdp2":
        torch.distributed.destroy_process_group()  # DeepSpeed's own threads would never let it end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
