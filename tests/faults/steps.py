"""The five steps as commands, for tests that disturb them."""

import sys
from pathlib import Path

TRAIN = (
    "--use_lora true --tune_llm false --lora_r 4 --learning_rate 1e-3 --per_device_train_batch_size 16 "
    "--num_train_epochs 2 --save_strategy steps --save_steps 3 --logging_steps 1 --dataloader_num_workers 1"
)

STEPS = {
    "validate-data": ("--data {inputs}/train.json --eval-data {inputs}/eval.json --out {out}/dataset", "dataset"),
    "preprocess": ("--dataset {inputs}/dataset --base-model {inputs}/base --out {out}/shards", "shards"),
    "train": (
        f"{TRAIN} --model_name_or_path {{inputs}}/base --data_path {{inputs}}/shards --output_dir {{out}}/adapter "
        "--checkpoint_uri {out}/checkpoints",
        "adapter",
    ),
    "merge": (
        "--base-model {inputs}/base --adapter {inputs}/adapter --shards {inputs}/shards --out {out}/model",
        "model",
    ),
    "evaluate": (
        "--model {inputs}/model --dataset {inputs}/dataset --base-model {inputs}/base --max-new-tokens 4 "
        "--out {out}/evaluation",
        "evaluation/predictions.jsonl",
    ),
}
"""Of each step its flags and where its result lies, with places for the folders `inputs` and `out`."""


# What a run's clock or address writes into; everything else must be the same to the byte.
DIFFER = {"training.json", "training.html", "trainer_state.json", "README.md", "adapter_config.json", "manifest.json"}


def command_of(step: str, inputs: Path, out: Path) -> list[str]:
    """A step on undisturbed inputs, writing below `out`."""
    flags = STEPS[step][0].format(inputs=inputs, out=out).split()
    return [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()", step, *flags]


def content(place: Path) -> dict[str, bytes]:
    """The files of a result by their path in it, but for those that differ between equal runs."""
    if place.is_file():
        return {place.name: place.read_bytes()}
    files = (path for path in place.rglob("*") if path.is_file() and path.name not in DIFFER)
    return {str(path.relative_to(place)): path.read_bytes() for path in files}
