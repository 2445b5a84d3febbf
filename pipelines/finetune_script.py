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
            from torch.distributed import TCPStore

            # torchrun's own store: a process group made for this alone would stand in the way of the training's.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=datetime.timedelta(hours=12))
            prepared = f"minicpmv-prepared-{os.environ.get('GROUP_RANK', '0')}"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with_prepared_data(flags)
                store.set(prepared, "yes")
            store.wait([prepared])
            flags = prepared_flags(flags)
    except (UserError, RetryableError) as error:
        end_process(error)
    main(flags)


if __name__ == "__main__":
    run(sys.argv[1:])
