"""The demonstration: real handwritten digits, a tiny MiniCPM-V 4.6, and the whole pipeline.

The digits are part of scikit-learn (1,797 scans with 8 × 8 gray levels from the UCI repository), so nothing is
downloaded. The base checkpoint has about a million random parameters in the exact architecture, tokenizer layout and
processor of MiniCPM-V 4.6. Everything that the tuned model knows afterwards, it learned in this run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minicpmv_finetune.minicpmv.tiny_checkpoint import IMAGE_SIDE, write_tiny_checkpoint

QUESTION = "Which digit is written in the picture?"
DEMO_CORPUS = (QUESTION, *(f"The digit is {digit}." for digit in range(10)))
"""Every text in the demonstration's data, for the tokenizer of its checkpoint."""

# The learning rate peaks at 3e-3 after 30 % of the steps: 1.5 million weights train stably with it, in a minute.
DEMO_INPUTS: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 3e-3,
    "num_train_epochs": 6.0,
    "per_device_train_batch_size": 32,
    "training_flags": {"lr_scheduler_type": "cosine", "warmup_steps": 0.3},
    "evaluation_options": {"max_new_tokens": 16, "batch_size": 32},
    "registered_model": "digits",
}


def run_demo(out: Path, seed: int, fresh: bool = False) -> dict[str, Any]:
    """Create data and base checkpoint, compile and run the pipeline, and print the results.

    Args:
        out: Folder that receives all files, and `summary.json`.
        seed: Seed for the split of the digits and for the training.
        fresh: Start over, even if an earlier run with this seed is unfinished.

    Returns:
        What a program wants to know of the run.
    """
    from minicpmv_finetune.tracking.promotion_record import read_promotion_record

    from .finetuning import FINETUNE
    from .local import run_pipeline
    from .summary import print_summary, short_path, summary_of

    train_data, eval_data = write_digits(out / "digits", seed)
    base = write_tiny_checkpoint(out / "base", corpus=DEMO_CORPUS)
    compiled = FINETUNE.write(out / "minicpmv-finetune.yaml")
    print("Handwritten digits, a tiny untrained MiniCPM-V 4.6, and the whole pipeline:\n")
    inputs = {
        "data_uri": str(train_data.absolute()),
        "eval_data_uri": str(eval_data.absolute()),
        "base_model_uri": str(base.absolute()),
        "seed": seed,
        **DEMO_INPUTS,
    }
    run = run_pipeline(out, inputs, fresh=fresh)
    without_lora = exact_match_without_lora(
        base, run.output("train", "adapter"), run.output("validate-data", "dataset")
    )
    scores = run.scores()
    summary = {
        "samples": int(scores["samples"]),
        "base": {"exact_match": scores["base_exact_match"]},
        "tuned": {"exact_match": scores["tuned_exact_match"]},
        "tuned_with_lora_b_zero": {"exact_match": without_lora},
        "gate": read_promotion_record(run.output("evaluate", "promotion_record")).model_dump(
            include={"promote", "reason"}
        ),
        "seconds": dict(run.seconds),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    image = json.loads(eval_data.read_text())[0]["image"]
    print_summary(
        run,
        out,
        more_rows={"tuned, lora_B set to zero": without_lora},
        compiled=compiled,
        question={"image": short_path(eval_data.parent / image), "prompt": QUESTION},
    )
    return {**summary_of(run, out), "tuned_with_lora_b_zero": without_lora, "pipeline": str(compiled)}


def exact_match_without_lora(base: Path, adapter: Path, dataset: Path) -> float:
    """The exact match of the tuned model on held-out data with every lora_B of the adapter set to zero.

    The modules that are trained completely (embeddings, merger, vision tower) keep their trained weights, so the
    difference to the tuned model is the contribution of the low-rank updates alone.
    """
    import torch

    from minicpmv_finetune.components.evaluate.metrics import exact_match, expected_answers
    from minicpmv_finetune.data.samples import read_samples
    from minicpmv_finetune.minicpmv.adapters import load_with_adapter
    from minicpmv_finetune.minicpmv.answer import answer
    from minicpmv_finetune.minicpmv.conversation import Encoder

    model = load_with_adapter(base, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    samples = list(read_samples(dataset, "eval"))
    answers = answer(model, Encoder.from_checkpoint(base), samples, DEMO_INPUTS["evaluation_options"]["max_new_tokens"])
    scores = [exact_match(given.text, expected_answers(sample)) for given, sample in zip(answers, samples, strict=True)]
    return float(np.mean(scores))


def write_digits(folder: Path, seed: int, held_out: int = 300) -> tuple[Path, Path]:
    """Write the digits as PNG images with questions and answers in MiniCPM-V's JSON format.

    Args:
        folder: Folder that receives `images/`, `train.json` and `eval.json`.
        seed: Seed for the split.
        held_out: Number of digits in `eval.json`.

    Returns:
        Paths of the two JSON files. No image in one file equals an image in the other.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"eval": [], "train": []}
    held_out_pixels = set()
    for number in order.tolist():
        cells = (digits.images[number] / 16 * 255).round().astype(np.uint8)
        pixels = hashlib.sha256(cells.tobytes()).hexdigest()
        split = "eval" if len(rows["eval"]) < held_out else "train"
        if split == "eval":
            held_out_pixels.add(pixels)
        elif pixels in held_out_pixels:
            continue
        name = f"images/{number:04d}.png"
        # IMAGE_SIDE is 8 patches, one patch for each row and column of the scan.
        Image.fromarray(cells).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.NEAREST).save(folder / name)
        rows[split].append(
            {
                "id": f"digit-{number:04d}",
                "image": name,
                "conversations": [
                    {"role": "user", "content": f"<image>\n{QUESTION}"},
                    {"role": "assistant", "content": f"The digit is {digits.target[number]}."},
                ],
            }
        )
    for split, samples in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(samples, indent=1))
    return folder / "train.json", folder / "eval.json"
