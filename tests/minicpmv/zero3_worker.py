"""One of two processes under ZeRO-3; only the first has an image. Writes the losses of two steps and an evaluation.

python -m torch.distributed.run --nproc_per_node 2 zero3_worker.py CHECKPOINT OUT
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from transformers.integrations import HfDeepSpeedConfig

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


def batch(encoder: Encoder, shows_image: bool) -> dict[str, torch.Tensor]:
    """Return a batch of one sample with the same text, with or without an image of 8 × 8 patches."""
    image = encoder.generation.image_token * (encoder.tokens_per_slice or 4)
    question = f"<image>{image}</image>\nWhat?" if shows_image else "What?"
    answer = "<|im_start|>assistant\nThe digit is 3.<|im_end|>\n"
    encoded = encoder.encode_text(f"<|im_start|>user\n{question}<|im_end|>\n{answer}")
    slices = [np.full((112, 112, 3), 90, dtype=np.uint8)] if shows_image else []
    return collate([ModelInput("", encoded.input_ids, encoded.labels, slices)], 0, 14, "right")


def main(checkpoint: Path, out: Path) -> None:
    """Load the model sharded, train two steps, and evaluate with the image in the other process."""
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed("gloo")
    keep = HfDeepSpeedConfig(SETTINGS)  # transformers loads models sharded as long as this object exists
    encoder = Encoder.from_checkpoint(checkpoint)
    model, _ = load_model(checkpoint, torch.float32)
    assert keep.is_zero3()
    parameters: list[Any] = list(model.parameters())
    assert all(parameter.ds_numel for parameter in parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    losses = []
    for _ in range(2):
        loss = engine(**batch(encoder, shows_image=rank == 0), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        losses.append(engine(**batch(encoder, shows_image=rank == 1), use_cache=False).loss.item())
    (out / f"{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
