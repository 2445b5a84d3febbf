"""What the launcher starts in each training process, with a fault of the last process that the environment names."""

import os
import sys
from typing import Any

from minicpmv_finetune.components.train.worker import leave_out_unused
from minicpmv_finetune.components.train.worker_exit import repeat_exit

FAULT = "FAULT_OF_TRAINING"
"""Environment variable: `step` or `sample`."""


def _raise_in_third_step() -> None:
    from minicpmv_finetune.components.train.trainer import MiniCPMVTrainer

    training_step = MiniCPMVTrainer.training_step

    def fail(trainer: MiniCPMVTrainer, *arguments: Any) -> Any:
        if trainer.state.global_step == 2:
            raise ValueError("the third step fails")
        return training_step(trainer, *arguments)

    MiniCPMVTrainer.training_step = fail  # type: ignore[assignment, method-assign]


def _raise_in_sample() -> None:
    from minicpmv_finetune.components.train.datasets import ExampleDataset
    from minicpmv_finetune.errors import UserError

    read = ExampleDataset.__getitem__
    count = 0

    def fail(dataset: ExampleDataset, position: int) -> Any:
        nonlocal count
        count += 1
        if count > 20:
            raise UserError("This sample is damaged; repair it.")
        return read(dataset, position)

    ExampleDataset.__getitem__ = fail  # type: ignore[method-assign]


if __name__ == "__main__":
    repeat_exit()
    leave_out_unused(sys.argv[1:])
    from minicpmv_finetune.components.train.finetune import main

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        {"step": _raise_in_third_step, "sample": _raise_in_sample}.get(os.environ[FAULT], lambda: None)()
    main(sys.argv[1:])
