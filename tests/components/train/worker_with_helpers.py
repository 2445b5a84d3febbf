"""What the launcher starts in each training process, where a tiny model's vision is computed ahead as a large one's.

A tiny tower has too little to compute to be worth a thread, and tests have one thread each.
"""

import sys
from collections.abc import MutableMapping
from typing import Any

from minicpmv_finetune.components.train.worker import leave_out_unused


def _compute_ahead() -> None:
    import torch

    from minicpmv_finetune.components.train import vision_ahead

    torch.set_num_threads(2)
    vision_ahead._WORTH_HELPERS, vision_ahead._PART_PATCHES, vision_ahead._PARTS_PER_THREAD = 0, 16, 0
    vision_ahead.needed_flops = lambda model, trained, work: work.patches
    collect = vision_ahead.VisionAhead._collect

    def collect_begun(self: vision_ahead.VisionAhead, batch: MutableMapping[str, Any]) -> None:
        assert "pixel_values" not in batch or "vision_parts" in batch  # helpers compute every batch with images
        collect(self, batch)

    vision_ahead.VisionAhead._collect = collect_begun  # type: ignore[method-assign]


if __name__ == "__main__":
    leave_out_unused(sys.argv[1:])
    from minicpmv_finetune.components.train.finetune import main

    _compute_ahead()
    main(sys.argv[1:])
