"""What the launcher starts in each training process, where a tiny model's vision is computed ahead as a large one's.

A tiny tower has too little to compute to be worth a thread, and tests have one thread each.
"""

import sys

from minicpmv_finetune.components.train.worker import leave_out_unused


def _compute_ahead() -> None:
    import torch

    from minicpmv_finetune.components.train import vision_ahead

    torch.set_num_threads(2)
    vision_ahead.Balance.favors_helpers = lambda *_: True  # type: ignore[method-assign]
    vision_ahead._PART_PATCHES = 16


if __name__ == "__main__":
    leave_out_unused(sys.argv[1:])
    from minicpmv_finetune.components.train.finetune import main

    _compute_ahead()
    main(sys.argv[1:])
