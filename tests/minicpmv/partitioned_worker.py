"""One of two processes that train and evaluate together; only one of them has an image in each batch.

The model is prepared by the training's own functions, and divided by the libraries' functions that a training uses.
Writes the losses of two steps with an image in the first process, and of an evaluation with one in the second.

The processes meet by torch's variables, and their arguments are STRATEGY OUT VERSION:KIND:TYPE:CHECKPOINT …
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.integrations import HfDeepSpeedConfig

from minicpmv_finetune.components.train import arguments, finetune
from minicpmv_finetune.components.train.fsdp import divide
from minicpmv_finetune.components.train.worker import import_deepspeed
from minicpmv_finetune.minicpmv import loss
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import detect_generation
from minicpmv_finetune.minicpmv.model_input import ModelInput

MAX_GRAD_NORM = 1.0
STRATEGIES = Path(arguments.__file__).parent / "strategies"
FLAGS = {
    "full": "",
    "lora": "--use_lora true --tune_llm false --tune_vision false --lora_r 4 --lora_dropout 0",
}

Step = Callable[[torch.Tensor], None]


def batch(encoder: Encoder, shows_image: bool) -> dict[str, torch.Tensor]:
    """Return a batch of one sample, with an image of 8 × 8 patches, or without one and with a longer answer."""
    image = encoder.generation.image_token * (encoder.tokens_per_slice or 8 * 8 // encoder.patches_per_token)
    question = f"<image>{image}</image>\nWhat?" if shows_image else "What?"
    # Two steps do not learn these by heart: a bound on the ratio of two losses means little where they are almost zero.
    words = "Seven or 8, 3, 5, 1." if shows_image else "9, 4, 5, 6, 7, 8 and 9, the digit is 3, or seven?"
    answer = f"<|im_start|>assistant\n{words}<|im_end|>\n"
    encoded = encoder.encode_text(f"<|im_start|>user\n{question}<|im_end|>\n{answer}")
    slices = [np.full((112, 112, 3), 90, dtype=np.uint8)] if shows_image else []
    return collate([ModelInput("", encoded.input_ids, encoded.labels, slices)], 0, 14, "right", normalized=False)


def prepare(checkpoint: Path, kind: str, dtype: str, strategy: str) -> Any:
    """Load a model and make it trainable, as a training does that has this strategy."""
    flags = ["--output_dir", "out", "--data_path", "data", "--use_cpu", "true", *FLAGS[kind].split()]
    given = arguments.parse([*flags, "--bf16", str(dtype == "bf16")])
    # On a CPU neither is accepted from a user.
    given.training.fsdp = "full_shard" if strategy == "fsdp2" else None
    given.training.deepspeed = strategy if strategy.startswith("zero") else None
    manifest = SimpleNamespace(rows=lambda split: 1)
    inputs: Any = SimpleNamespace(base=checkpoint, generation=detect_generation(checkpoint), manifest=manifest)
    return finetune._prepare_model(inputs, given).trained


def train_and_evaluate(
    model: Any, step: Step, encoder: Encoder, images: tuple[bool, bool], autocast: bool = False
) -> list[float]:
    """The losses of two steps and an evaluation; `images` says whether steps and evaluation have an image."""
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    losses = []
    model.train()
    for _ in range(2):
        with context:
            output = model(**batch(encoder, images[0]), use_cache=False, loss_only=True)
        step(output.loss)
        losses.append(output.loss.item())
    model.eval()
    with torch.no_grad(), context:
        losses.append(model(**batch(encoder, images[1]), use_cache=False, loss_only=True).loss.item())
    return losses


def adam(trained: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    """Adam with steps that weights in bf16 can follow.

    After smaller steps the losses would only compare roundings, and one process's gradient could be lost within the
    bounds of the tests. The large `eps` keeps gradients that are zero but for rounding from becoming whole steps.
    """
    return torch.optim.Adam(trained, lr=1e-3, eps=1e-3)


def optimizer_of(model: Any) -> tuple[torch.optim.Optimizer, Step]:
    """An optimizer, and a function that takes a step of it from a loss."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adam(trained)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def _under_ddp(checkpoint: Path, kind: str, dtype: str) -> tuple[Any, Step, Any]:
    model = torch.nn.parallel.DistributedDataParallel(prepare(checkpoint, kind, dtype, "ddp"))
    return model, optimizer_of(model)[1], None


def _under_deepspeed(strategy: str, checkpoint: Path, kind: str, dtype: str) -> tuple[Any, Step, Any]:
    import deepspeed

    settings = json.loads((STRATEGIES / f"{strategy}.json").read_text()) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": False},
    }
    if strategy == "zero3":
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    # For transformers ZeRO-3 is on as long as this object exists.
    kept = HfDeepSpeedConfig(settings) if strategy == "zero3" else None
    model = prepare(checkpoint, kind, dtype, strategy)
    # What PEFT adds is divided by DeepSpeed's engine, the base model already as it is loaded.
    of_base = [
        weight for name, weight in model.named_parameters() if ".lora_" not in name and ".modules_to" not in name
    ]
    assert not kept or all(weight.ds_numel for weight in of_base)
    engine: Any
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model)[0], config=settings)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step, kept


def _under_fsdp2(checkpoint: Path, kind: str, dtype: str) -> tuple[Any, Step, Any]:
    """Divide as a training does; accelerate's own Accelerator would not do it on a CPU."""
    from accelerate import FullyShardedDataParallelPlugin

    settings = json.loads((STRATEGIES / "fsdp2.json").read_text())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["version"],
        reshard_after_forward=settings["reshard_after_forward"],
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=settings["cpu_ram_efficient_loading"],
    )
    if dtype == "bf16":
        plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if dtype == "bf16" else "no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    model = prepare(checkpoint, kind, dtype, "fsdp2")
    whole = [weight for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name]
    assert {weight.dtype for weight in whole} == {torch.bfloat16 if dtype == "bf16" else torch.float32}
    divide(accelerator, model)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    return model, optimizer_of(model)[1], None


def main(strategy: str, out: Path, cases: list[str]) -> None:
    """Train and evaluate each case, one after the other."""
    rank = int(os.environ["RANK"])
    loss.MAX_LOGITS = 5 * 512  # so that the processes need different numbers of parts of their logits
    torch.distributed.init_process_group("gloo")
    if strategy.startswith("zero"):
        import_deepspeed()
        import deepspeed

        deepspeed.init_distributed("gloo")
        assert deepspeed.comm.comm.cdb.shm_comm_op is None  # which it would have compiled for minutes
    losses = {}
    for case in cases:
        _, kind, dtype, folder = case.split(":")
        checkpoint = Path(folder)
        if strategy == "ddp":
            model, step, kept = _under_ddp(checkpoint, kind, dtype)
        elif strategy == "fsdp2":
            model, step, kept = _under_fsdp2(checkpoint, kind, dtype)
        else:
            model, step, kept = _under_deepspeed(strategy, checkpoint, kind, dtype)
        encoder = Encoder.from_checkpoint(checkpoint)
        autocast = strategy == "ddp" and dtype == "bf16"
        losses[case] = train_and_evaluate(model, step, encoder, (rank == 0, rank == 1), autocast)
        del model, step, kept
    (out / f"{rank}.json").write_text(json.dumps(losses))
    if not strategy.startswith("zero"):
        torch.distributed.destroy_process_group()  # DeepSpeed's own threads would never let it end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
