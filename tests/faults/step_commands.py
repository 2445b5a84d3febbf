"""The five steps as commands, for tests that disturb them."""

import sys
from pathlib import Path
from typing import NamedTuple

from minicpmv_finetune.outputs import MARK

TRAIN_FLAGS = (
    "--use_lora true --tune_llm false --lora_r 4 --learning_rate 1e-3 --per_device_train_batch_size 16 "
    "--num_train_epochs 2 --save_strategy steps --save_steps 3 --logging_steps 1 --dataloader_num_workers 1"
)


STEP_SECONDS = 400
"""A step that takes longer hangs."""


class Step(NamedTuple):
    """How a step is started.

    Attributes:
        flags: Flags of the command, with placeholders for the folders `inputs` and `out`.
        result: Path of the step's result below `out`.
    """

    flags: str
    result: str


STEPS = {
    "validate-data": Step("--data {inputs}/train.json --eval-data {inputs}/eval.json --out {out}/dataset", "dataset"),
    "preprocess": Step("--dataset {inputs}/dataset --base-model {inputs}/base --out {out}/shards", "shards"),
    "train": Step(
        f"{TRAIN_FLAGS} --model_name_or_path {{inputs}}/base --data_path {{inputs}}/shards "
        "--output_dir {out}/adapter --checkpoint_uri {out}/checkpoints",
        "adapter",
    ),
    "merge": Step(
        "--base-model {inputs}/base --adapter {inputs}/adapter --shards {inputs}/shards --out {out}/model",
        "model",
    ),
    "evaluate": Step(
        "--model {inputs}/model --dataset {inputs}/dataset --base-model {inputs}/base --max-new-tokens 4 "
        "--out {out}/evaluation",
        "evaluation/predictions.jsonl",
    ),
}

# Files that contain times or paths of the run; all other files of two runs must be identical byte by byte.
RUN_DEPENDENT_FILES = {
    "training.json",
    "training.html",
    "trainer_state.json",
    "README.md",
    "adapter_config.json",
    "manifest.json",
    MARK,
}


def step_command(step: str, inputs: Path, out: Path) -> list[str]:
    """The command that runs a step on undisturbed inputs and writes below `out`."""
    flags = STEPS[step].flags.format(inputs=inputs, out=out).split()
    return [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()", step, *flags]


def read_result(result: Path) -> dict[str, bytes]:
    """The content of a result's files by their path in it, without those that differ between equal runs."""
    if result.is_file():
        return {result.name: result.read_bytes()}
    files = (path for path in result.rglob("*") if path.is_file() and path.name not in RUN_DEPENDENT_FILES)
    return {str(path.relative_to(result)): path.read_bytes() for path in files}
