"""Takes the place of the published finetune.py in a launch script of one's own.

    torchrun $DISTRIBUTED_ARGS -m minicpmv_finetune.pipelines.finetune_script --data_path train.json …

The flags are the published ones, raw JSON included: the first process of a machine validates and prepares it, the
others wait. `minicpmv-finetune train` does the same and starts torchrun itself.
"""

import datetime
import os
import sys

from ..components.errors import RetryableError, UserError, end_process
from ..components.train.finetune import main
from .raw_data import prepared_flags, with_prepared_data


def run(flags: list[str]) -> None:
    """Prepare raw data once a machine, then train."""
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            flags = with_prepared_data(flags)
        else:
            import torch.distributed as group

            group.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with_prepared_data(flags)
            group.barrier()
            group.destroy_process_group()
            flags = prepared_flags(flags)
    except (UserError, RetryableError) as error:
        end_process(error)
    main(flags)


if __name__ == "__main__":
    run(sys.argv[1:])
